"""OLMo 2: norms of what attention and the MLP give, not of what they read, and one over all heads
of q and one over those of k."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder, LayerNorms
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.module import LAYER, Module, everywhere, heads, hidden, kv_heads
from slipstream.weights.json import Fields

_AFTER_ATTENTION = f"{LAYER}.post_attention_layernorm"
_AFTER_MLP = f"{LAYER}.post_feedforward_layernorm"
_UNFOLDED: dict[str, Any] = {"reads": None}


class WholeNormsDecoder(Decoder):
    """Normalizes q and k over all of their heads at once."""

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """norm(q_proj(x)) | norm(k_proj(x)) | v_proj(x)."""
        q, k, v = (self.linear(x, f"{prefix}{name}_proj") for name in "qkv")
        normed = self.norm(q, f"{prefix}q_norm"), self.norm(k, f"{prefix}k_norm")
        return self.ops.concat([*normed, v])


class OLMo2Decoder(WholeNormsDecoder):
    """Attention and the MLP read the residual stream as it is."""

    norms = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def read(keys: Fields) -> ModelConfig:
    """One flag for the four biases of attention."""
    biased = keys.flag("attention_bias")
    return replace(read_decoder(keys), attention_bias=biased, o_bias=biased)


def write(config: ModelConfig) -> dict[str, Any]:
    """The flag; the token of padding, whose default is beyond a small vocabulary."""
    return {"attention_bias": config.attention_bias, "pad_token_id": None}


def whole_norms(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """A table whose norms of q and k are as wide as those."""
    return differing(
        modules,
        q_norm={"rows": (heads,), "present": everywhere},
        k_norm={"rows": (kv_heads,), "present": everywhere},
    )


MODULES = (
    *(
        module
        for module in differing(
            whole_norms(DECODER),
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), _UNFOLDED),
            o_proj={"stream": _AFTER_ATTENTION},
            post_attention_layernorm={"gguf": "blk.{i}.post_attention_norm"},
            down_proj={"stream": _AFTER_MLP},
        )
        if module.name != f"{LAYER}.input_layernorm"
    ),
    Module(_AFTER_MLP, "norm", (hidden,), gguf="blk.{i}.post_ffw_norm"),
)
DEFAULTS = {
    "vocab_size": 50304,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
}

ARCHITECTURE = Architecture(
    "olmo2", OLMo2Decoder, MODULES, DEFAULTS, read, write, GGUFFamily("olmo2")
)
