"""How GGUF files describe Gemma 4: by layer what config.json says by kind of layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.builder.models.architecture import GGUFFamily
from slipstream.builder.models.config import FULL, SLIDING
from slipstream.builder.models.gemma2 import GGUF_KEYS
from slipstream.builder.models.gemma4_decoder import DOUBLE, GLOBAL_HEAD, INPUT, MOE, SHARED
from slipstream.errors import CheckpointError

_KV_HEADS, _WIDTH, _KINDS = "num_key_value_heads", "intermediate_size", "layer_types"
_PATTERN = "attention.sliding_window_pattern"
_BASE, _TURNING = "rope_local_base_freq", "rope_local_dim"  # of layers with a window
_USUAL_BASE = 10000.0


def _concluded(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is other in layers that see everything, and in those that read the keys of another."""
    kinds, kv_heads, widths = found.get(_KINDS), found[_KV_HEADS], found[_WIDTH]
    if kinds is None or not len(kinds) == len(kv_heads) == len(widths):
        raise CheckpointError(
            f"the GGUF file's gemma4.{_PATTERN} does not say of each layer whether it has a "
            "window, or other lists are not as long; convert it again"
        )
    own = {"head_dim": found[GLOBAL_HEAD], _KV_HEADS: _first(kv_heads, kinds, FULL)}
    return {
        _KV_HEADS: _first(kv_heads, kinds, SLIDING),
        _WIDTH: widths[0],
        DOUBLE: widths[-1] != widths[0],
        MOE: bool(found.get("num_experts")),
        "vocab_size_per_layer_input": found["vocab_size"],
        "per_layer_config": {str(i): own for i, kind in enumerate(kinds) if kind == FULL},
        "rope_parameters": {FULL: found["rope_parameters"], SLIDING: _windowed(found)},
    }


def _first(values: Sequence[Any], kinds: Sequence[str], kind: str) -> Any:  # noqa: ANN401
    """That of the first layer of a kind; of the first layer where there is none."""
    return next((v for v, k in zip(values, kinds, strict=True) if k == kind), values[0])


def _windowed(found: Mapping[str, Any]) -> dict[str, Any]:
    turning = found.get(_TURNING, found["head_dim"])
    return {
        "rope_type": "default",
        "rope_theta": found.get(_BASE, _USUAL_BASE),
        "partial_rotary_factor": turning / found["head_dim"],
    }


FAMILY = GGUFFamily(
    "gemma4",
    keys={
        **GGUF_KEYS,
        _KINDS: _PATTERN,
        "head_dim": "attention.key_length_swa",
        GLOBAL_HEAD: "attention.key_length",
        SHARED: "attention.shared_kv_layers",
        INPUT: "embedding_length_per_layer_input",
        _BASE: "rope.freq_base_swa",
        _TURNING: "rope.dimension_count_swa",
        "num_experts": "expert_count",
        "top_k_experts": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    },
    by_layer={_KV_HEADS: "attention.head_count_kv", _WIDTH: "feed_forward_length"},
    concluded=_concluded,
)
