"""Qwen3: Qwen2 with an RMS norm on each q and k head, and biases only where config.json asks."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.qwen2 import DEFAULTS, read_windowed, write_windowed
from slipstream.weights.json import Fields


def _read(keys: Fields) -> ModelConfig:
    biased = keys.flag("attention_bias")
    return replace(read_windowed(keys), attention_bias=biased, o_bias=biased, qk_norm=True)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, **write_windowed(config)}


ARCHITECTURE = Architecture(
    "qwen3",
    Decoder,
    DECODER,
    {**DEFAULTS, "head_dim": 128},
    _read,
    _write,
    GGUFFamily("qwen3"),
)
