"""OLMo 2: norms of what attention and the MLP give, not of what they read, and one over all heads
of q and one over those of k."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.module import Module, everywhere, heads, kv_heads
from slipstream.builder.models.norms import LayerNorms, with_norms
from slipstream.weights.json import Fields

AFTER = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


class WholeNormsDecoder(Decoder):
    """Normalizes q and k over all of their heads at once."""

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """norm(q_proj(x)) | norm(k_proj(x)) | v_proj(x)."""
        q, k, v = (self.linear(x, f"{prefix}{name}_proj") for name in "qkv")
        normed = (
            self.ops.rms_norm_of_all(x, self.norm_weight(f"{prefix}{name}_norm"), self.eps())
            for name, x in (("q", q), ("k", k))
        )
        return self.ops.concat([*normed, v])


class OLMo2Decoder(WholeNormsDecoder):
    """Attention and the MLP read the residual stream as it is."""

    norms = AFTER


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
        q_norm={"rows": (heads,), "present": everywhere, "shard": "column"},
        k_norm={"rows": (kv_heads,), "present": everywhere, "shard": "column"},
    )


MODULES = with_norms(whole_norms(DECODER), AFTER)
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
