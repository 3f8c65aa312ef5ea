"""Qwen2-MoE: Qwen2 whose MLPs are experts, in all layers or in some, beside an MLP that every token
takes as far as a gate of its own says."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    DENSE_LAYERS,
    RENORMALIZE,
    ExpertDecoder,
    expert_modules,
    gguf_keys,
    in_some_layers,
    read_experts,
    shared_modules,
    write_experts,
)
from slipstream.builder.models.module import LAYER, Extent, Module, hidden, one
from slipstream.builder.models.qwen2 import DEFAULTS, read_windowed, write_windowed
from slipstream.weights.json import Fields

_SHARED, _SHARED_WIDTH = "mlp.shared_expert", "shared_expert_intermediate_size"
_COUNT, _WIDTH = "num_experts", "moe_intermediate_size"


def read_routing(keys: Fields, config: ModelConfig, count: str) -> ModelConfig:
    """With the experts, of which ``count`` names the number, and the layers that have none."""
    step = keys.integer("decoder_sparse_step", minimum=1)
    named = keys.integers("mlp_only_layers", ())
    layers = range(config.num_layers)
    routing = {
        **read_experts(keys, count, _WIDTH),
        RENORMALIZE: keys.flag("norm_topk_prob"),
        DENSE_LAYERS: [i for i in layers if i in named or (i + 1) % step],
    }
    return replace(config, extras=config.extras | routing)


def write_routing(config: ModelConfig) -> dict[str, Any]:
    """The same."""
    return {
        **write_experts(config, _COUNT, _WIDTH),
        "norm_topk_prob": config.extras[RENORMALIZE],
        "decoder_sparse_step": 1,
        "mlp_only_layers": config.extras[DENSE_LAYERS],
    }


def _slides(layer: int, bound: int) -> bool:
    """Every other one of the first layers has a window."""
    return layer < bound and layer % 2 == 0


def _read(keys: Fields) -> ModelConfig:
    shared = {_SHARED_WIDTH: keys.integer(_SHARED_WIDTH, minimum=1)}
    config = replace(
        read_windowed(keys, _slides), attention_bias=keys.flag("qkv_bias"), extras=shared
    )
    return read_routing(keys, config, _COUNT)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_windowed(config),
        **write_routing(config),
        _SHARED_WIDTH: config.extras[_SHARED_WIDTH],
        "qkv_bias": config.attention_bias,
    }


def _shared_inner(config: ModelConfig) -> Extent:
    return Extent(config.extras[_SHARED_WIDTH])


_GATE = Module(
    f"{LAYER}.{_SHARED}_gate", "router", (one,), hidden, gguf="blk.{i}.ffn_gate_inp_shexp"
)
ARCHITECTURE = Architecture(
    "qwen2_moe",
    ExpertDecoder,
    in_some_layers(
        DECODER, (*expert_modules("mlp"), *shared_modules(_SHARED, _shared_inner), _GATE)
    ),
    {
        **DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        _SHARED_WIDTH: 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    _read,
    _write,
    # llama.cpp computes it without norm_topk_prob and with experts in every layer.
    GGUFFamily(
        "qwen2moe",
        keys={
            **gguf_keys(_COUNT, _WIDTH),
            _SHARED_WIDTH: "expert_shared_feed_forward_length",
        },
    ),
)
