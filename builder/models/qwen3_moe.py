"""Qwen3-MoE: Qwen3 whose MLPs are experts, in all layers or in some."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    EXPERTS,
    RENORMALIZE,
    TOP_K,
    WIDTH,
    ExpertDecoder,
    expert_modules,
    read_experts,
)
from slipstream.builder.models.module import Module
from slipstream.builder.models.qwen2 import DEFAULTS, read_windowed, write_windowed
from slipstream.weights.json import Fields

_DENSE = "dense_layers"
_MLP = ("gate_proj", "up_proj", "down_proj")


def _read(keys: Fields) -> ModelConfig:
    biased = keys.flag("attention_bias")
    config = replace(read_windowed(keys), attention_bias=biased, o_bias=biased, qk_norm=True)
    step, named = keys.integer("decoder_sparse_step", minimum=1), keys.integers("mlp_only_layers")
    layers = range(config.num_layers)
    # Newer files have the name that all families share.
    count = "num_experts" if keys.has("num_experts") else "num_local_experts"
    return replace(
        config,
        extras={
            **read_experts(keys, count, "moe_intermediate_size"),
            RENORMALIZE: keys.flag("norm_topk_prob"),
            _DENSE: [i for i in layers if i in named or (i + 1) % step],
        },
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_windowed(config),
        "attention_bias": config.attention_bias,
        "num_experts": config.extras[EXPERTS],
        "num_experts_per_tok": config.extras[TOP_K],
        "moe_intermediate_size": config.extras[WIDTH],
        "norm_topk_prob": config.extras[RENORMALIZE],
        "decoder_sparse_step": 1,
        "mlp_only_layers": config.extras[_DENSE],
    }


def _concluded(found: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp computes whatever the model's config.json said."""
    return {"norm_topk_prob": True}


def _is_dense(config: ModelConfig, layer: int) -> bool:
    return layer in config.extras[_DENSE]


def _is_sparse(config: ModelConfig, layer: int) -> bool:
    return layer not in config.extras[_DENSE]


def _sparse(module: Module) -> Module:
    return replace(module, present=_is_sparse)


ARCHITECTURE = Architecture(
    "qwen3_moe",
    ExpertDecoder,
    (
        *differing(DECODER, **{name: {"present": _is_dense} for name in _MLP}),
        *map(_sparse, expert_modules("mlp")),
    ),
    {
        **DEFAULTS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    _read,
    _write,
    GGUFFamily(
        "qwen3moe",
        keys={
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        concluded=_concluded,
    ),
)
