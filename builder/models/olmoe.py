"""OLMoE: experts in every layer, and one norm over all heads of q and one over those of k."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from slipstream.builder.models import olmo2
from slipstream.builder.models.architecture import Architecture
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
from slipstream.weights.json import Fields

_COUNT, _WIDTH = "num_experts", "intermediate_size"
_CLIP = "clip_qkv"


class OLMoEDecoder(ExpertDecoder, olmo2.WholeNormsDecoder):
    """Bounds what attention reads, where the configuration does."""

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """norm(q_proj(x)) | norm(k_proj(x)) | v_proj(x), each element within the bound."""
        qkv, bound = super().qkv(x, prefix), self.config.extras[_CLIP]
        return qkv if bound is None else self.ops.clip(qkv, bound)


def _read(keys: Fields) -> ModelConfig:
    extras = {
        **read_experts(keys, _COUNT, _WIDTH),
        RENORMALIZE: keys.flag("norm_topk_prob"),
        _CLIP: keys.optional_number(_CLIP, positive=True),
    }
    return replace(olmo2.read(keys), extras=extras)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **olmo2.write(config),
        **write_experts(config, _COUNT, _WIDTH),
        "norm_topk_prob": config.extras[RENORMALIZE],
        _CLIP: config.extras[_CLIP],
    }


ARCHITECTURE = Architecture(
    "olmoe",
    OLMoEDecoder,
    with_experts(olmo2.whole_norms(DECODER), expert_modules("mlp")),
    {
        **olmo2.DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    _read,
    _write,
)
