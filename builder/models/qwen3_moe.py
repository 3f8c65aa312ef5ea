"""Qwen3-MoE: Qwen3 whose MLPs are experts, in all layers or in some."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import ExpertDecoder, expert_modules, in_some_layers
from slipstream.builder.models.qwen2 import DEFAULTS, read_windowed, write_windowed
from slipstream.builder.models.qwen2_moe import read_routing, write_routing
from slipstream.weights.json import Fields


def _read(keys: Fields) -> ModelConfig:
    biased = keys.flag("attention_bias")
    config = replace(read_windowed(keys), attention_bias=biased, o_bias=biased, qk_norm=True)
    # Newer files have the name that all families share.
    count = "num_experts" if keys.has("num_experts") else "num_local_experts"
    return read_routing(keys, config, count)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_windowed(config),
        **write_routing(config),
        "attention_bias": config.attention_bias,
    }


ARCHITECTURE = Architecture(
    "qwen3_moe",
    ExpertDecoder,
    in_some_layers(DECODER, expert_modules("mlp")),
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
    },
    _read,
    _write,
)
