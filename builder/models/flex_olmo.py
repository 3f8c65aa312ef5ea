"""FlexOlmo: norms after attention and the experts, and of all q and all k heads as one."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models.architecture import Architecture, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    RENORMALIZE,
    ExpertDecoder,
    expert_modules,
    read_experts,
    with_experts,
    write_experts,
)
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.module import everywhere, heads, kv_heads
from slipstream.builder.models.norms import LayerNorms, with_norms
from slipstream.weights.json import Fields

_NORMS = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_COUNT, _WIDTH, _RENORMALIZE = "num_experts", "intermediate_size", "norm_topk_prob"


class FlexOlmoDecoder(ExpertDecoder):
    """Attention and the experts read the residual stream as it is."""

    norms = _NORMS

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """q and k each have one norm over all heads, so PagedAttention has none to compute."""
        parts = {part: self.linear(x, f"{prefix}{part}_proj") for part in "qkv"}
        normed = [self.norm(parts[part], f"{prefix}{part}_norm") for part in "qk"]
        return self.ops.concat([*normed, parts["v"]])


def read(keys: Fields) -> ModelConfig:
    """One flag for the four biases of attention; the experts."""
    biased = keys.flag("attention_bias")
    extras = {**read_experts(keys, _COUNT, _WIDTH), RENORMALIZE: keys.flag(_RENORMALIZE)}
    return replace(read_decoder(keys), attention_bias=biased, o_bias=biased, extras=extras)


def write(config: ModelConfig) -> dict[str, Any]:
    """The flags and the experts; the token of padding, whose default is beyond a small
    vocabulary."""
    return {
        **write_experts(config, _COUNT, _WIDTH),
        "attention_bias": config.attention_bias,
        _RENORMALIZE: config.extras[RENORMALIZE],
        "pad_token_id": None,
    }


ARCHITECTURE = Architecture(
    name="flex_olmo",
    decoder=FlexOlmoDecoder,
    modules=with_norms(
        with_experts(
            differing(
                DECODER,
                q_norm={"rows": (heads,), "present": everywhere},
                k_norm={"rows": (kv_heads,), "present": everywhere},
            ),
            expert_modules("mlp"),
        ),
        _NORMS,
    ),
    defaults={
        "vocab_size": 100352,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "eos_token_id": 100257,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        _RENORMALIZE: False,
    },
    read=read,
    write=write,
)
