"""Mistral: Llama with a sliding window in every layer, and no biases."""

from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import SLIDING, ModelConfig
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.huggingface_config import read_decoder, with_window
from slipstream.builder.models.llama import MODULES
from slipstream.weights.json import Fields


def read(keys: Fields) -> ModelConfig:
    """A window, if there is one, is that of every layer."""
    config = read_decoder(keys)
    return with_window(config, keys, (SLIDING,) * config.num_layers)


def write(config: ModelConfig) -> dict[str, Any]:
    """The window."""
    return {"sliding_window": config.sliding_window}


_WINDOW = "attention.sliding_window"
ARCHITECTURE = Architecture(
    "mistral",
    Decoder,
    MODULES,
    {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    read,
    write,
    # llama.cpp has no architecture of its own for Mistral.
    GGUFFamily("llama", mark=_WINDOW, keys={"sliding_window": _WINDOW}),
)
