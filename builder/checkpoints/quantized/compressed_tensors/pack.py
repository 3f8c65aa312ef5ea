"""pack-quantized: integers of 1 to 8 bits in int32 words along K, zero points in words along N."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.packing import unpack_codes
from slipstream.builder.checkpoints.quantized.scales import spread
from slipstream.builder.checkpoints.quantized.weights import Parts, signed_zeros
from slipstream.errors import CheckpointError
from slipstream.weights.safetensors import StoredTensor
from slipstream.weights.tensor import (
    InputTransform,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    pack_nibbles,
)

# Codes without a gap, or as many whole codes as a word holds (older versions).
Layout = Literal["dense", "padded"]
Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a weight ``[N, K]`` lies in words: u = q + 2**(bits-1)."""

    shape: tuple[int, int]
    bits: int
    layout: Layout

    def zeros_shape(self, groups: int) -> tuple[int, int]:
        """That of packed zero points, ``[words, groups]``."""
        return _words(self.shape[0], self.bits, self.layout), groups


def packing_of(words: StoredTensor, shape: tuple[int, int], bits: int) -> Packing:
    """The packing of a weight ``[N, K]``, by the words of a row.

    Raises CheckpointError when no packing of ``bits`` bits has that many.
    """
    n, k = shape
    if 1 <= bits <= 8 and words.shape[:1] == (n,) and len(words.shape) == 2:
        layouts: tuple[Layout, ...] = ("dense", "padded")
        for layout in layouts:
            if words.shape[1] == _words(k, bits, layout):
                return Packing(shape, bits, layout)
    raise CheckpointError(
        f"{words.path}: tensor {words.name} has shape {list(words.shape)}, but a weight "
        f"{list(shape)} of {bits} bits needs {[n, _words(k, max(bits, 1), 'dense')]}; num_bits in "
        "config.json is that of another file: download both again"
    )


def order_of(g_idx: StoredTensor | None, k: int, group: int) -> InputTransform | None:
    """What the group of each column, int32 ``[K]``, means for x; None when columns are in order.

    -1 says that the columns were not reordered.
    """
    if g_idx is None:
        return None
    groups = g_idx.map().astype(np.int32)
    ordered = np.arange(k, dtype=np.int32) // group
    if np.any(groups < 0) or np.array_equal(groups, ordered):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], ordered):
        raise CheckpointError(
            f"{g_idx.path}: {g_idx.name} does not put {group} columns in each group; it is "
            "damaged, or group_size in config.json is that of another file: download both again"
        )
    return InputTransform(perm=order)


def packed_weight(parts: Parts, packing: Packing) -> LazyTensor:
    """A weight in words, with ``zero`` in words along N (int32) or one a byte (int8)."""
    form = replace(parts.format(), shape=packing.shape)
    perm = None if parts.input is None else parts.input.perm

    def load() -> QuantTensor:
        return QuantTensor(
            parts.name,
            form,
            _codes(parts.weight.map(), packing, form.bits, perm),
            parts.spread_scale(form.shape),
            _zeros(parts, packing, form) if parts.zero is not None else None,
            input=parts.input,
        )

    return LazyTensor(parts.name, form, load, parts.input)


def _codes(
    words: NDArray[np.generic], packing: Packing, bits: int, perm: NDArray[np.int32] | None
) -> Codes:
    k = packing.shape[1]
    if packing.bits == bits == 4 and perm is None:
        # The words are our own layout already.
        return np.ascontiguousarray(words).view(np.uint8)[:, : (k + 1) // 2]
    codes = unpack_words(words, packing.bits, k, packing.layout)
    codes += np.uint8(_shift(packing.bits, bits))
    if perm is not None:
        codes = codes[:, perm]
    return pack_nibbles(codes) if bits == 4 else codes


def _zeros(parts: Parts, packing: Packing, form: WeightFormat) -> Codes:
    assert parts.zero is not None
    if parts.zero.dtype != "I32":
        return signed_zeros(parts, form)
    columns = unpack_words(parts.zero.map().T, packing.bits, packing.shape[0], packing.layout)
    zeros = columns.T + np.uint8(_shift(packing.bits, form.bits))
    return np.asarray(spread(zeros, parts.grid, form.shape), np.uint8)


def _shift(stored: int, ours: int) -> int:
    """What is added to a code of ``stored`` bits to make its middle that of ``ours`` bits."""
    return int(2 ** (ours - 1) - 2 ** (stored - 1))


def _words(count: int, bits: int, layout: Layout) -> int:
    return math.ceil(count * bits / 32) if layout == "dense" else math.ceil(count / (32 // bits))


def unpack_words(words: NDArray[np.generic], bits: int, count: int, layout: Layout) -> Codes:
    """The first ``count`` codes of each row of int32 words ``[R, W]``: a new u8 ``[R, count]``."""
    rows = np.ascontiguousarray(words)
    if layout == "dense":
        return unpack_codes(rows, bits)[:, :count].copy()
    shifts = np.arange(0, 32 - bits + 1, bits, dtype=np.uint32)
    codes = (rows.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(len(rows), -1)[:, :count].astype(np.uint8)
