"""One linear of a GPTQ directory: its tensors, checked against each other and config.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.gptq.zeros import (
    StoredZeros,
    open_zeros,
    written_by_gptqmodel,
)
from slipstream.builder.checkpoints.quantized.patterns import matches
from slipstream.builder.checkpoints.quantized.refused import refusal
from slipstream.builder.checkpoints.quantized.stored import Notes, Stored, group_size
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import StoredTensor

_BITS = (2, 3, 4, 8)
_WORDS = ("I32", "I64", "I16", "I8")
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class GPTQModule:
    """The tensors of one linear. ``group_of`` is the group of each of the K columns, None when
    group j is columns ``j * group`` and on."""

    name: str
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredZeros
    n: int
    k: int
    bits: int
    group: int
    group_of: NDArray[np.int32] | None


def override_of(quantization: Fields, module: str) -> Fields | None:
    """What ``dynamic`` says of a module by its first pattern that matches: None leaves it out."""
    dynamic = quantization.fields("dynamic", {})
    for pattern in dynamic.values:
        if matches(re.sub(r"^[+-]:", "", pattern), module, quantization, "dynamic"):
            return None if pattern.startswith("-:") else dynamic.fields(pattern, {})
    return Fields({}, quantization.origin)


def open_module(
    stored: Stored,
    name: str,
    quantization: Fields,
    config: ModelConfig,
    notes: Notes,
) -> GPTQModule:
    """The tensors of a linear, checked against each other and against the configuration."""
    override = override_of(quantization, name)
    if override is None:
        notes.add("quantized, though config.json leaves it out", name)
    settings = quantization
    if override is not None:
        settings = replace(quantization, values={**quantization.values, **override.values})
    codes = stored.take(f"{name}.qweight", *_WORDS)
    scales = stored.take(f"{name}.scales", *_SCALES)
    _check_shapes(stored, name, codes, scales)
    index = stored.take_optional(f"{name}.g_idx", "I32", "I64")
    word = codes.numpy_dtype().itemsize * 8
    configured = settings.integer("bits", 4, minimum=1)
    k = _input_features(name, codes, index, config, configured)
    bits = _bits(stored, name, codes, k, configured)
    if bits != configured:
        notes.add(f"config.json says {configured} bits, its tensors {bits}", name)
    groups, n = scales.shape
    width = -(-n * bits // word)
    zeros = stored.take(f"{name}.qzeros", codes.dtype, shape=(groups, width))
    group_of = _groups_of_columns(stored, name, index, (groups, k), settings, notes)
    group = _group_size(stored, name, group_of, (groups, k), settings, notes)
    packed = open_zeros(zeros, n, bits, carries=written_by_gptqmodel(quantization))
    return GPTQModule(name, codes, scales, packed, n, k, bits, group, group_of)


def _check_shapes(stored: Stored, name: str, codes: StoredTensor, scales: StoredTensor) -> None:
    found = f"qweight {list(codes.shape)} beside scales {list(scales.shape)}"
    if len(codes.shape) == len(scales.shape) == 2 and scales.shape[0]:
        if codes.shape[1] == scales.shape[1]:
            if name.endswith("embed_tokens"):
                raise CheckpointError(
                    f"{stored.path} quantizes the embedding {name} with GPTQ, which cannot be "
                    "read; pass files whose embedding is not quantized"
                )
            return
        if codes.shape[1] * 8 == scales.shape[1] or codes.shape[0] == scales.shape[0]:
            raise CheckpointError(
                f"{stored.path}: {name} has {found}, which is AWQ's layout, but config.json says "
                "quant_method 'gptq'; use the config.json that belongs to these weights"
            )
        if codes.shape[1] == 2 * scales.shape[1]:
            raise refusal(stored.path, "gptq_marlin", known=())
    raise CheckpointError(
        f"{stored.path}: {name} has {found}, which is not GPTQ's layout; download weights and "
        "config.json again, or pass the unquantized checkpoint"
    )


def _input_features(
    name: str,
    codes: StoredTensor,
    index: StoredTensor | None,
    config: ModelConfig,
    bits: int,
) -> int:
    """K, which g_idx has one element for; else the model's, else all that the words hold."""
    if index is not None and len(index.shape) == 1 and index.shape[0]:
        return index.shape[0]
    shape = config.weight_shape(f"{name}.weight")
    held = codes.shape[0] * codes.numpy_dtype().itemsize * 8 // bits
    return shape[1] if shape is not None and len(shape) == 2 else held


def _bits(stored: Stored, name: str, codes: StoredTensor, k: int, configured: int) -> int:
    """Bits of a code by the number of words that K of them take."""
    word = codes.numpy_dtype().itemsize * 8
    for bits in (configured, *_BITS):
        # Codes of 3 bits straddle words, which is defined for words of 32 bits alone.
        possible = bits in _BITS and (bits != 3 or word == 32)
        if possible and -(-k * bits // word) == codes.shape[0]:
            return bits
    raise CheckpointError(
        f"{stored.path}: {name}.qweight has {codes.shape[0]} rows of {word} bits for {k} input "
        f"features, which no code of {', '.join(map(str, _BITS))} bits fills; config.json says "
        f"{configured} bits: download both again, or pass the unquantized checkpoint"
    )


def _groups_of_columns(
    stored: Stored,
    name: str,
    index: StoredTensor | None,
    shape: tuple[int, int],
    settings: Fields,
    notes: Notes,
) -> NDArray[np.int32] | None:
    """g_idx ``[K]``, None when it is absent or says nothing; ``shape`` is (groups, K)."""
    groups, k = shape
    if index is None or index.shape == (0,):
        return None
    if index.shape != (k,):
        stored.take(index.name, shape=(k,))
    group_of = index.map().astype(np.int32)
    if groups > 1 and not settings.flag("desc_act", False) and not group_of.any():
        notes.add("its g_idx is all 0, as if it had one group; columns are grouped in order", name)
        return None
    if group_of.min() < 0 or group_of.max() >= groups:
        raise CheckpointError(
            f"{stored.path}: {index.name} names groups {group_of.min()} to {group_of.max()}, but "
            f"there are scales for {groups}; download the checkpoint again"
        )
    return group_of


def _group_size(
    stored: Stored,
    name: str,
    group_of: NDArray[np.int32] | None,
    shape: tuple[int, int],
    settings: Fields,
    notes: Notes,
) -> int:
    """Columns of a group; ``shape`` is (groups, K)."""
    groups, k = shape
    configured = group_size(settings, "group_size", 128)
    group = k if configured == -1 else configured
    if group_of is not None:
        found = int(np.count_nonzero(group_of == 0))
    else:
        fits = group > 0 and -(-k // group) == groups
        found = group if fits else k // groups if k % groups == 0 else 0
    if -(-k // max(found, 1)) != groups:
        if group_of is not None:
            return 0
        raise CheckpointError(
            f"{stored.path}: {name} has scales for {groups} groups of its {k} input features, "
            f"which config.json says are of {group}; download weights and config.json again"
        )
    if found != min(group, k):
        notes.add(f"config.json says group_size {configured}, its tensors {found}", name)
    return found
