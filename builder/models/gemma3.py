"""Gemma 3: Gemma 2 with norms of q and k heads, a rotary for each kind of layer, full attention in
every sixth, and no cap on scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope
from slipstream.builder.models.gemma import DEFAULTS, GELU
from slipstream.builder.models.gemma2 import (
    ATTENTION_CAP,
    GGUF_KEYS,
    LOGITS_CAP,
    MODULES,
    SCALE,
    GemmaDecoder,
    query_scale,
    read_sandwich,
    write,
)
from slipstream.builder.models.huggingface_config import head_size, read_rope, read_ropes
from slipstream.weights.json import Fields


def _read(keys: Fields) -> ModelConfig:
    if keys.has(ATTENTION_CAP):
        raise keys.refusal(ATTENTION_CAP, "null, as in every Gemma 3")
    every = keys.integer("sliding_window_pattern", minimum=1)
    return read_sandwich(keys, every, _ropes(keys), qk_norm=True)


def _ropes(keys: Fields) -> dict[str, Rope]:
    """By kind of layer; older files have one for full attention and a base for windows."""
    given, size = keys.values.get("rope_parameters"), head_size(keys)
    base = keys.number("rope_local_base_freq", positive=True)
    if not isinstance(given, Mapping) or given.keys().isdisjoint((FULL, SLIDING)):
        return {FULL: read_rope(keys, size), SLIDING: Rope(base, size)}
    by_kind = {FULL: {}, SLIDING: {}, **given}
    if isinstance(by_kind[SLIDING], Mapping):
        by_kind[SLIDING] = {"rope_theta": base, **by_kind[SLIDING]}
    return read_ropes(Fields({**keys.values, "rope_parameters": by_kind}, keys.origin), size)


def _concluded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A file without a window has full attention in every layer."""
    scale = query_scale(raw, layers=62)
    return scale if raw.get("sliding_window") else {**scale, "sliding_window_pattern": 1}


ARCHITECTURE = Architecture(
    name="gemma3_text",
    decoder=GemmaDecoder,
    modules=MODULES,
    defaults={
        **DEFAULTS,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": GELU,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        SCALE: 256,
        ATTENTION_CAP: None,
        LOGITS_CAP: None,
    },
    read=_read,
    write=write,
    gguf=GGUFFamily(
        "gemma3",
        keys={
            **GGUF_KEYS,
            "rope_local_base_freq": "rope.freq_base_swa",
            "sliding_window_pattern": "attention.sliding_window_pattern",
        },
        concluded=_concluded,
    ),
)
