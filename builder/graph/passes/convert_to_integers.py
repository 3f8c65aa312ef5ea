"""Codes that are no integers become 8-bit ones, for kernels that multiply integers only.

* float4_e2m1: twice its numbers are whole, 0 to 12, so nothing is lost.
* float8_e4m3: groups of 32 in units of 2^-6 of the power of two below their largest number. Numbers
  of at least 1/8 of it are multiples of that unit; smaller ones are rounded to it.
* a codebook: its numbers as the best multiples of 1/64 to 1/127 of the largest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.graph.describe import describe_format
from slipstream.builder.graph.passes.matrices import rewrite_matrices
from slipstream.builder.graph.passes.rewrite import Holds
from slipstream.builder.graph.program import Program
from slipstream.errors import CheckpointError
from slipstream.weights.parallel import in_parallel, row_chunks
from slipstream.weights.tensor import E2M1, Kind, LazyTensor, QuantTensor, WeightFormat

_GROUP = 32
_MIDPOINT = 128
_CHUNK = 1 << 18  # elements worked on at once: they stay in the cache of a core

Convert = Callable[[QuantTensor, WeightFormat], QuantTensor]


@dataclass(frozen=True, slots=True)
class ConvertToIntegers:
    """``kinds`` of codes become integers where a kernel ``holds`` the result, and not them."""

    kinds: tuple[Kind, ...]
    holds: Holds

    def __call__(self, program: Program) -> int:
        """Returns the number of weights that were converted."""

        def rewrite(tensor: LazyTensor) -> LazyTensor | None:
            if tensor.format.kind not in self.kinds or self.holds(tensor.format):
                return None
            fmt = integer_format(tensor.format)
            return None if fmt is None or not self.holds(fmt) else _converted(tensor, fmt)

        def message(old: LazyTensor, new: LazyTensor) -> str:
            before, after = describe_format(old.format), describe_format(new.format)
            return f"{before} becomes {after}, {_LOSSES[old.format.kind]}"

        return rewrite_matrices(program, rewrite, message, logging.WARNING)


def integer_format(fmt: WeightFormat) -> WeightFormat | None:
    """The integers that a format of other codes becomes; None where its groups do not allow it."""
    k = fmt.shape[1]
    if fmt.kind == "float8_e4m3":
        whole = k % _GROUP == 0 and (fmt.group >= k or fmt.group % _GROUP == 0)
        return WeightFormat(fmt.shape, "int", "float32", 8, _GROUP) if whole else None
    if fmt.kind not in _CONVERSIONS:
        return None
    return WeightFormat(fmt.shape, "int", "float32", 8, fmt.group, rows=fmt.rows)


def _converted(tensor: LazyTensor, fmt: WeightFormat) -> LazyTensor:
    convert = _CONVERSIONS[tensor.format.kind]

    def load() -> QuantTensor:
        loaded = tensor.load()
        return replace(convert(loaded, fmt), input=loaded.input)

    return LazyTensor(tensor.name, fmt, load, tensor.input)


def _from_e2m1(tensor: QuantTensor, fmt: WeightFormat) -> QuantTensor:
    doubled = np.concatenate([E2M1, -E2M1]) * 2
    table = (doubled + _MIDPOINT).astype(np.uint8)
    scale = tensor.multipliers() * np.float32(0.5)
    return QuantTensor(tensor.name, fmt, table[tensor.unpacked_codes()], scale)


def _from_codebook(tensor: QuantTensor, fmt: WeightFormat) -> QuantTensor:
    assert tensor.codebook is not None
    whole, unit = _best_multiples(tensor.codebook)
    table = (whole + _MIDPOINT).astype(np.uint8)
    codes = table[tensor.unpacked_codes()]
    return QuantTensor(tensor.name, fmt, codes, tensor.multipliers() * unit)


def _best_multiples(numbers: NDArray[np.float32]) -> tuple[NDArray[Any], np.float32]:
    """Whole numbers of -127 to 127 and their unit, nearest to some numbers in the mean square."""
    largest = np.abs(numbers).max()
    units = largest / np.arange(64, 128, dtype=np.float32)
    whole = np.rint(numbers / units[:, None])
    errors = np.square(whole * units[:, None] - numbers).sum(axis=1)
    best = int(errors.argmin())
    return whole[best], np.float32(units[best])


def _from_e4m3(tensor: QuantTensor, fmt: WeightFormat) -> QuantTensor:
    old, (n, k) = tensor.format, fmt.shape
    scales = tensor.multipliers()
    groups = np.arange(k // _GROUP) * _GROUP // old.group
    codes = np.empty((n, k), np.uint8)
    scale = np.empty((n, k // _GROUP), np.float32)

    def convert(part: slice) -> None:
        rows = np.arange(part.start, part.stop)
        whole, unit = _grid(tensor.codes[part].astype(np.float32), tensor.name)
        codes[part] = (whole + _MIDPOINT).astype(np.uint8).reshape(-1, k)
        scale[part] = scales[np.ix_(rows // old.rows, groups)] * unit

    in_parallel(convert, row_chunks(n, k, _CHUNK))
    return QuantTensor(tensor.name, fmt, codes, scale)


def _grid(values: NDArray[np.float32], name: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Whole numbers ``[n, K/32, 32]`` of at most 120 and their units ``[n, K/32]``."""
    blocks = values.reshape(len(values), -1, _GROUP)
    largest = np.abs(blocks).max(axis=-1)
    if not np.isfinite(largest).all():
        raise CheckpointError(
            f"tensor {name} holds undefined numbers; the checkpoint is damaged: download it again"
        )
    _, exponent = np.frexp(largest)  # largest < 2**exponent
    unit = np.ldexp(np.float32(1), exponent - 7)
    return np.rint(blocks / unit[..., None]), unit


_CONVERSIONS: Mapping[Kind, Convert] = MappingProxyType(
    {"float8_e4m3": _from_e4m3, "float4_e2m1": _from_e2m1, "codebook": _from_codebook}
)
_LOSSES: Mapping[Kind, str] = MappingProxyType(
    {
        "float8_e4m3": "where a number below 1/8 of its group's largest is rounded",
        "float4_e2m1": "with the same numbers",
        "codebook": "where its numbers are rounded to 8 bits",
    }
)
