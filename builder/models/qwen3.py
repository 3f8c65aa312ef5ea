"""Qwen3: Qwen2 with an RMS norm on each q and k head, and biases only where config.json asks."""

from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.qwen2 import DEFAULTS

ARCHITECTURE = Architecture(
    "qwen3",
    Decoder,
    {**DEFAULTS, "head_dim": 128},
    sliding="by_layer_type",
    attention_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
)
