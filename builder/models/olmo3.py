"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary angles are not scaled."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slipstream.builder.models import olmo2
from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.huggingface_config import (
    head_size,
    layer_kinds,
    read_decoder,
    read_rope,
    read_ropes,
    with_window,
)
from slipstream.weights.json import Fields

_EVERY = 4  # the last of so many layers sees everything


def read(keys: Fields) -> ModelConfig:
    """Windows and, in files that say them so, rotary angles by kind of layer."""
    config, biased = read_decoder(keys, ropes=_ropes(keys)), keys.flag("attention_bias")
    kinds = [FULL if (layer + 1) % _EVERY == 0 else SLIDING for layer in range(config.num_layers)]
    config = with_window(config, keys, layer_kinds(keys, kinds))
    return replace(config, attention_bias=biased, o_bias=biased)


def write(config: ModelConfig) -> dict[str, Any]:
    """Windows and, with or without one, the kinds of layers, which have angles of their own; beside
    what OLMo 2 has."""
    kinds = {"layer_types": list(config.layer_kinds)}
    return {"sliding_window": config.sliding_window, **kinds, **olmo2.write(config)}


def _ropes(keys: Fields) -> Mapping[str, Rope]:
    """Files from before transformers 5 have one scaling, which is that of full attention."""
    head_dim = head_size(keys)
    ropes = read_ropes(keys, head_dim) if keys.has("rope_parameters") else {}
    full = ropes.get(FULL) or read_rope(keys, head_dim)
    return {SLIDING: Rope(full.theta, head_dim), **ropes, FULL: full}


def _of_full_attention(raw: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp scales the rotary angles of layers without a window alone."""
    return {"rope_parameters": {FULL: raw["rope_parameters"]}}


ARCHITECTURE = Architecture(
    "olmo3",
    olmo2.OLMo2Decoder,
    olmo2.MODULES,
    {**olmo2.DEFAULTS, "rope_theta": 500000.0},
    read,
    write,
    GGUFFamily(
        "olmo2",
        mark="attention.sliding_window",
        keys={
            "sliding_window": "attention.sliding_window",
            "layer_types": "attention.sliding_window_pattern",
        },
        concluded=_of_full_attention,
    ),
)
