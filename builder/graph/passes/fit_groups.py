"""Groups that no kernel holds are written in others that say exactly the same.

A scale of a long or ragged group is repeated for the shorter groups inside it, one of a block of
rows for each of its rows, and 4-bit codes around a midpoint or with zero points become 8-bit ones
around a midpoint where only those have kernels. No number changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.graph.describe import describe_format
from slipstream.builder.graph.passes.matrices import rewrite_matrices
from slipstream.builder.graph.passes.rewrite import Holds
from slipstream.builder.graph.program import Program
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

_GROUPS = (128, 64, 32, 16)
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class FitGroups:
    """``kernels`` says what each kind of kernel holds, the best kind first."""

    kernels: Sequence[Holds]

    def __call__(self, program: Program) -> int:
        """Returns the number of weights that are written otherwise; what fits nowhere is left."""

        def rewrite(tensor: LazyTensor) -> LazyTensor | None:
            fmt = self.fitting(tensor.format)
            return None if fmt in (None, tensor.format) else refitted(tensor, fmt)

        def message(old: LazyTensor, new: LazyTensor) -> str:
            before, after = describe_format(old.format), describe_format(new.format)
            return f"{before} is stored as {after}, with the same numbers"

        return rewrite_matrices(program, rewrite, message, logging.INFO)

    def fitting(self, fmt: WeightFormat) -> WeightFormat | None:
        """The form in which the best kernel holds a format; None when no kernel holds any."""
        if fmt.kind not in ("int", "float8_e4m3", "float4_e2m1"):
            return None
        forms = list(_forms(fmt))
        return next((form for holds in self.kernels for form in forms if holds(form)), None)


def refitted(tensor: LazyTensor, fmt: WeightFormat) -> LazyTensor:
    """A weight in another form of its format, one of those that ``FitGroups`` considers."""
    return LazyTensor(tensor.name, fmt, lambda: refit(tensor.load(), fmt), tensor.input)


def refit(tensor: QuantTensor, fmt: WeightFormat) -> QuantTensor:
    """The numbers of a weight, bit for bit, in shorter groups and perhaps wider codes."""
    old, (n, k) = tensor.format, fmt.shape
    rows = np.arange(-(-n // fmt.rows)) * fmt.rows // old.rows
    groups = np.arange(-(-k // fmt.group)) * fmt.group // old.group

    def pick(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if numbers is None else numbers[np.ix_(rows, groups)]

    codes, zero = tensor.codes, pick(tensor.zero)
    if fmt.bits != old.bits:
        codes, zero = _widened(tensor), None
    return replace(
        tensor, format=fmt, codes=codes, scale=pick(tensor.scale), zero=zero,
        offset=pick(tensor.offset),
    )  # fmt: skip


def _forms(fmt: WeightFormat) -> Iterator[WeightFormat]:
    yield fmt
    narrower = list(_narrower(fmt))
    yield from narrower
    if fmt.kind == "int" and fmt.bits == 4 and fmt.zero != "offset":
        for form in (replace(fmt, rows=1), *narrower):
            yield replace(form, bits=8, zero="midpoint")


def _narrower(fmt: WeightFormat) -> Iterator[WeightFormat]:
    k = fmt.shape[1]
    whole = fmt.group >= k
    if fmt.kind == "float8_e4m3":
        if whole and fmt.rows > 1:
            yield replace(fmt, rows=1, group=k)
        if fmt.rows % _BLOCK == 0 and (whole or fmt.group % _BLOCK == 0):
            yield replace(fmt, rows=_BLOCK, group=_BLOCK)
        return
    if fmt.rows > 1:
        yield replace(fmt, rows=1)
    for group in _GROUPS:
        if k % group == 0 and (whole or fmt.group % group == 0) and group < fmt.group:
            yield replace(fmt, rows=1, group=group)


def _widened(tensor: QuantTensor) -> NDArray[np.uint8]:
    """4-bit codes, less their zero, as 8-bit codes around 128."""
    codes = tensor.unpacked_codes().astype(np.int16)
    if tensor.zero is None:
        return (codes + (128 - 8)).astype(np.uint8)
    fmt = tensor.format
    zero = np.repeat(tensor.zero.astype(np.int16), fmt.rows, axis=0)[: fmt.shape[0]]
    zero = np.repeat(zero, fmt.group, axis=1)[:, : fmt.shape[1]]
    return (codes - zero + 128).astype(np.uint8)
