"""Scales of an fp8 KV cache, in every spelling that quantizers have used."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from slipstream.builder.checkpoints.quantized.stored import Stored
from slipstream.builder.models.config import ModelConfig
from slipstream.weights.tensor import KVScales

# self_attn.k_scale, .attn.k_scale, .qkv_proj.k_scale, .k_proj.k_scale (modelopt),
# .k_proj.output_scale (2024), .k_cache.scale, and kv_scale, which is both.
_SCALE = re.compile(
    r"(?:.*\.)?layers\.(\d+)\..*?"
    r"(?:\b(k|v|kv)_scale|\b(k|v)_proj\.output_scale|\b(k|v)_cache\.scale)"
)
# What files say of attention besides, and that does not change what a scale means.
_BESIDE = re.compile(
    r".*\.(?:[qkv]_zero_point|[kv]_proj\.output_zero_point|q_scale|q_proj\.output_scale|prob(?:_output)?_scale)"
)


def read_kv_scales(
    stored: Stored, config: ModelConfig, *, fp8: bool = True
) -> tuple[KVScales | None, tuple[str, ...]]:
    """One scale a layer for keys and for values, and notes; None when the directory has none.

    A layer without a scale, or with one that is no positive number, gets 1: right for any cache,
    only coarser, and said in a note. Of several scales (one a head) the largest is taken, by which
    none saturates. Without ``fp8`` the scales are of a cache that is quantized in another type:
    they are accounted for and dropped, and a note says so.
    """
    found = _take(stored, config.num_layers)
    beside = _take_beside(stored)
    if not any(found.values()):
        return None, beside
    if not fp8:
        return None, (
            *beside,
            "the scales of its KV cache are not of fp8 and are not used; choose the cache with "
            "--kv-cache-dtype",
        )
    notes = list(beside)
    scales = {part: _filled(found[part], part, config.num_layers, notes) for part in ("k", "v")}
    if any(np.size(value) > 1 for values in found.values() for value in values.values()):
        notes.append("its KV scales are one a head; each layer uses its largest")
    return KVScales(scales["k"], scales["v"]), tuple(notes)


def _take(stored: Stored, layers: int) -> Mapping[str, dict[int, np.ndarray]]:
    """Numbers of the scales by "k" or "v" and layer."""
    found: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for name in stored.names():
        match = _SCALE.fullmatch(name)
        if match is None or int(match[1]) >= layers:
            continue
        values = stored.take(name).map().astype(np.float32)
        for part in match[2] or match[3] or match[4]:
            found[part][int(match[1])] = values
    return found


def _take_beside(stored: Stored) -> tuple[str, ...]:
    names = [name for name in stored.names() if _BESIDE.fullmatch(name)]
    shifted = [n for n in names if n.endswith("zero_point") and np.any(stored.take(n).map() != 0)]
    for name in names:
        stored.take(name)
    notes = []
    if any(not name.endswith("zero_point") for name in names):
        notes.append("queries and attention weights stay 16-bit; their scales are not used")
    if shifted:
        notes.append(
            f"{len(shifted)} zero points of keys, values or queries such as {shifted[0]} are not "
            "used: our caches are symmetric"
        )
    return tuple(notes)


def _filled(
    values: Mapping[int, np.ndarray], part: str, layers: int, notes: list[str]
) -> tuple[float, ...]:
    scales = [float(np.max(values[i], initial=0)) if i in values else 0.0 for i in range(layers)]
    missing = [i for i, scale in enumerate(scales) if not (scale > 0 and math.isfinite(scale))]
    if missing:
        notes.append(
            f"{len(missing)} of {layers} layers have no usable scale of {part}, such as layer "
            f"{missing[0]}; they use 1"
        )
    return tuple(1.0 if i in missing else scale for i, scale in enumerate(scales))
