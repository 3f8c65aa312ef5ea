"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in some layers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig
from slipstream.builder.models.decoder import DECODER, Decoder
from slipstream.builder.models.huggingface_config import (
    layer_kinds,
    read_decoder,
    with_window,
    write_window,
)
from slipstream.weights.json import Fields

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


def _after_the_first(layer: int, first: int) -> bool:
    return layer >= first


def read_windowed(
    keys: Fields, slides: Callable[[int, int], bool] = _after_the_first
) -> ModelConfig:
    """Where windows are used at all, ``layer_types`` says which layers have one; without it,
    ``slides`` does, of the layer and ``max_window_layers``."""
    config = read_decoder(keys)
    if not keys.has("sliding_window") or not keys.flag("use_sliding_window"):
        return config
    bound = keys.integer("max_window_layers")
    by_number = [SLIDING if slides(layer, bound) else FULL for layer in range(config.num_layers)]
    return with_window(config, keys, layer_kinds(keys, by_number))


def write_windowed(config: ModelConfig) -> dict[str, Any]:
    """The window, its layers, and that they are used."""
    return (
        {}
        if config.sliding_window is None
        else {"use_sliding_window": True, **write_window(config)}
    )


def _read(keys: Fields) -> ModelConfig:
    return replace(read_windowed(keys), attention_bias=True)


ARCHITECTURE = Architecture(
    "qwen2", Decoder, DECODER, DEFAULTS, _read, write_windowed, GGUFFamily("qwen2")
)
