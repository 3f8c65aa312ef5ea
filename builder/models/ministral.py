"""Ministral of 2024: Mistral with a window in some layers."""

from typing import Any

from slipstream.builder.models import mistral
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import SLIDING, ModelConfig
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.huggingface_config import (
    layer_kinds,
    read_decoder,
    with_window,
    write_window,
)
from slipstream.builder.models.llama import MODULES
from slipstream.weights.json import Fields


def read(keys: Fields) -> ModelConfig:
    """A window, if there is one, is that of every layer unless they are named."""
    config = read_decoder(keys)
    return with_window(config, keys, layer_kinds(keys, (SLIDING,) * config.num_layers))


def write(config: ModelConfig) -> dict[str, Any]:
    """The window and its layers."""
    return {"sliding_window": None, **write_window(config)}


# llama.cpp writes it as Mistral, without the windows of layers.
ARCHITECTURE = Architecture(
    "ministral", Decoder, MODULES, mistral.ARCHITECTURE.defaults, read, write
)
