"""The one representation of a weight, quantized or dense, between checkpoint, algorithms and
packers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from slipstream.weights.parallel import in_parallel, row_chunks

Kind = Literal["dense", "int", "float8_e4m3", "float4_e2m1", "codebook"]
ZeroKind = Literal["midpoint", "zero", "offset"]
Activation = Literal["none", "token", "static", "group", "block"]
_CHUNK = 1 << 18  # elements worked on at once: they stay in the cache of a core
# The bits of an element that are all ones in NaN and infinity only.
_NOT_FINITE = {
    "float64": 0x7FF << 52,
    "float32": 0xFF << 23,
    "float16": 0x1F << 10,
    "bfloat16": 0xFF << 7,
    "float8_e5m2": 0x1F << 2,
    "float8_e4m3fn": 0x7F,
    "float8_e8m0fnu": 0xFF,
}
# The numbers of the eight codes of float4_e2m1 without its sign, which is bit 3.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What is known of a weight without reading its data.

    ``zero`` says how an integer code becomes a number: ``midpoint`` is ``(q - 2**(bits-1)) *
    scale``, ``zero`` is ``(q - zero) * scale`` and ``offset`` is ``q * scale + offset``. ``group``
    is the number of consecutive elements along K, and ``rows`` of rows, that share a scale; a
    weight with one scale a row has ``group`` = K. ``dtype`` is the element type of a dense weight
    and the type of the scales of a quantized one, as a NumPy / ml_dtypes name. ``activation`` says
    how x is rounded to the type of the codes where a kernel multiplies in that type: not at all, by
    one scale a token, by the weight's own ``input_scale``, by one scale a token and group of K, or
    to int8 in blocks of 32, each by its own range, as the CPU kernels do to every x.
    ``bits`` is the size of a stored code, 4 or 8: codes of 2 and 3 bits are held in 4, of 5 to 7 in
    8, with a ``zero`` of their own. Where ``group`` does not divide K, the last group is shorter.
    """

    shape: tuple[int, ...]
    kind: Kind = "dense"
    dtype: str = "float32"
    bits: int = 0
    group: int = 0
    zero: ZeroKind = "midpoint"
    rows: int = 1
    activation: Activation = "none"


@dataclass(frozen=True, slots=True, eq=False)
class InputTransform:
    """What is done to x before a weight's codes are applied: ``(x * scale)[:, perm]``.

    perm   int32 ``[K]``: column j of the codes belongs to column ``perm[j]`` of x (act-order).
    scale  float32 ``[K]``, in the order of x (the pre-scale of AWQ and SmoothQuant exports).
    """

    perm: NDArray[np.int32] | None = None
    scale: NDArray[np.float32] | None = None

    def equals(self, other: InputTransform | None) -> bool:
        """Whether both do the same to x, so that one result serves both weights."""
        return other is not None and all(
            (mine is None and theirs is None)
            or (mine is not None and theirs is not None and np.array_equal(mine, theirs))
            for mine, theirs in ((self.perm, other.perm), (self.scale, other.scale))
        )


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A weight ``[N, K]`` (a dense one may have any rank) as codes and the numbers that decode
    them.

    codes   dense: the values. 4 bits (int, float4_e2m1, codebook): u8 ``[N, ceil(K/2)]``, low
            nibble = even k; 8 bits: u8 ``[N, K]``. float8_e4m3: that type, ``[N, K]``.
    scale   ``[ceil(N/rows), ceil(K/group)]`` multipliers.
    zero    u8 ``[N, ceil(K/group)]`` when ``format.zero == "zero"``.
    offset  float ``[N, ceil(K/group)]`` when ``format.zero == "offset"``.
    input_scale  float32 ``[1]`` when ``format.activation == "static"``.
    scale2    float32 ``[1]``, a multiplier of all scales (NVFP4); None is 1.
    codebook  float32 ``[16]``, the number of each code, when ``format.kind == "codebook"``.
              Of stacked weights that differ in it, either has a row for each row of ``scale``
              and of the weight: ``[ceil(N/rows), 1]`` and ``[N, 16]``.
    input     what must be done to x before these codes are applied; None is nothing.
    """

    name: str
    format: WeightFormat
    codes: NDArray[np.generic]
    scale: NDArray[np.generic] | None = None
    zero: NDArray[np.uint8] | None = None
    offset: NDArray[np.generic] | None = None
    input_scale: NDArray[np.float32] | None = None
    scale2: NDArray[np.float32] | None = None
    codebook: NDArray[np.float32] | None = None
    input: InputTransform | None = None

    def numbers(self) -> dict[str, NDArray[np.generic]]:
        """The arrays whose elements are numbers rather than codes, by what they are."""
        float8 = self.format.kind in ("dense", "float8_e4m3")
        parts: dict[str, NDArray[np.generic] | None] = {
            "values": self.codes if float8 else None,
            "scales": self.scale,
            "offsets": self.offset,
            "input scales": self.input_scale,
            "second scales": self.scale2,
            "codebook": self.codebook,
            "scales of its input": None if self.input is None else self.input.scale,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def unpacked_codes(self) -> NDArray[np.uint8]:
        """Integer codes one a byte: u8 ``[N, K]``."""
        n, k = self.format.shape
        codes = self.codes.astype(np.uint8, copy=False)
        if self.format.bits == 8:
            return codes
        out = np.empty((n, codes.shape[1] * 2), np.uint8)
        out[:, 0::2] = codes & 15
        out[:, 1::2] = codes >> 4
        return out[:, :k]

    def multipliers(self) -> NDArray[np.float32]:
        """What codes are multiplied by, ``scale2`` included: float32 in the shape of ``scale``."""
        assert self.scale is not None, self.format
        scale = self.scale.astype(np.float32)
        return scale if self.scale2 is None else scale * self.scale2

    def dequantize(self) -> NDArray[np.float32]:
        """The weight as float32 in its full shape: what multiplies x, ``input`` included."""
        values = self._decoded()
        if self.input is None:
            return values
        if self.input.perm is not None:
            ordered = np.empty_like(values)
            ordered[:, self.input.perm] = values
            values = ordered
        return values if self.input.scale is None else values * self.input.scale

    def _decoded(self) -> NDArray[np.float32]:
        """The numbers of the codes, column by column as they are stored."""
        if self.format.kind == "dense":
            return self.codes.astype(np.float32)
        scale = self._spread(self.multipliers())
        kind, zero = self.format.kind, self.format.zero
        if kind == "float8_e4m3":
            return self.codes.astype(np.float32) * scale
        codes = self.unpacked_codes()
        if kind == "codebook":
            assert self.codebook is not None
            books = np.broadcast_to(self.codebook, (len(codes), 16))
            return np.take_along_axis(books, codes, axis=1) * scale
        if kind == "float4_e2m1":
            return np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7]) * scale
        if zero == "offset":
            return codes * scale + self._spread(self.offset)
        midpoint = np.float32(2 ** (self.format.bits - 1))
        return (codes - (midpoint if zero == "midpoint" else self._spread(self.zero))) * scale

    def _spread(self, numbers: NDArray[Any] | None) -> NDArray[np.float32]:
        """A number for every element: float32 ``[N, K]``."""
        assert numbers is not None, self.format
        n, k = self.format.shape
        rows = np.repeat(numbers.astype(np.float32), self.format.rows, axis=0)[:n]
        return np.repeat(rows, self.format.group, axis=1)[:, :k]


@dataclass(frozen=True, slots=True)
class KVScales:
    """Scales of an fp8 KV cache, one a layer: keys and values are stored divided by them."""

    k: tuple[float, ...]
    v: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A weight that is read (memory-mapped, converted, quantized) only when ``load`` is called.

    ``input`` is that of the tensor that ``load`` gives.
    """

    name: str
    format: WeightFormat
    load: Callable[[], QuantTensor] = field(repr=False)
    input: InputTransform | None = field(default=None, repr=False)


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The dtype of a NumPy or ml_dtypes name, such as ``float32`` or ``bfloat16``."""
    return np.dtype(getattr(ml_dtypes, name, name))


def is_finite(numbers: NDArray[np.generic]) -> bool:
    """Whether no element is NaN or infinite; takes a few MB a core, whatever the size."""
    mask = np.array(_NOT_FINITE[numbers.dtype.name], f"u{numbers.dtype.itemsize}")
    # As bits, which is four times as fast as ml_dtypes' own way.
    bits = np.ascontiguousarray(numbers).reshape(-1).view(mask.dtype)
    broken: list[slice] = []

    def check(part: slice) -> None:
        if (bits[part] & mask).max() == mask:
            broken.append(part)

    in_parallel(check, row_chunks(len(bits), 1, _CHUNK))
    return not broken


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """u8 ``[N, K]`` of 0..15 to u8 ``[N, ceil(K/2)]``, low nibble = even k."""
    n, k = codes.shape
    if k % 2:
        codes = np.concatenate([codes, np.zeros((n, 1), np.uint8)], axis=1)
    return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << 4), np.uint8)


def stack_rows(tensors: Sequence[LazyTensor], name: str | None = None) -> LazyTensor:
    """Weights of one format (but for their rows) as one of that name, rows in order; biases
    likewise along their only axis."""
    assert all(tensor.input is None for tensor in tensors), "apply_input_transforms comes first"
    first = tensors[0].format
    rows = sum(tensor.format.shape[0] for tensor in tensors)
    name = name or _joint_name([tensor.name for tensor in tensors])
    shape = (rows, *first.shape[1:])

    def load() -> QuantTensor:
        loaded = [tensor.load() for tensor in tensors]
        return QuantTensor(
            name,
            replace(first, shape=shape),
            np.concatenate([tensor.codes for tensor in loaded]),
            _join([tensor.scale for tensor in loaded]),
            _join([tensor.zero for tensor in loaded]),
            _join([tensor.offset for tensor in loaded]),
            _largest([tensor.input_scale for tensor in loaded]),
            _shared([_scale2(tensor) for tensor in loaded]),
            _shared([_codebook(tensor) for tensor in loaded]),
        )

    return LazyTensor(name, replace(first, shape=shape), load)


def reorder_rows(tensor: LazyTensor, order: NDArray[np.intp]) -> LazyTensor:
    """Row ``order[i]`` of a weight, or element of a bias, as row i."""
    form = _ordered(tensor.format, order)
    return replace(tensor, format=form, load=lambda: reordered(tensor.load(), order))


def reordered(tensor: QuantTensor, order: NDArray[np.intp]) -> QuantTensor:
    """Row ``order[i]`` of a weight as row i; rows may be left out, or come several times.

    Where rows leave their block of rows, every row gets the scale of the block that it was in.
    """
    form, rows = _ordered(tensor.format, order), tensor.format.rows
    return _taken(tensor, form, order, (order // rows)[:: form.rows])


def _ordered(form: WeightFormat, order: NDArray[np.intp]) -> WeightFormat:
    blocks = order // form.rows
    kept = np.array_equal(blocks, np.repeat(blocks[:: form.rows], form.rows)[: len(order)])
    shape = (len(order), *form.shape[1:])
    return replace(form, shape=shape, rows=form.rows if kept else 1)


def row_slice(tensor: QuantTensor, start: int, stop: int) -> QuantTensor:
    """Rows ``start`` to ``stop`` of a weight; both are bounds of its blocks of rows, or its end."""
    fmt = tensor.format
    assert start % fmt.rows == 0 and (stop % fmt.rows == 0 or stop == fmt.shape[0]), fmt
    blocks = slice(start // fmt.rows, -(-stop // fmt.rows))
    form = replace(fmt, shape=(stop - start, *fmt.shape[1:]))
    return _taken(tensor, form, slice(start, stop), blocks)


def _taken(
    tensor: QuantTensor,
    form: WeightFormat,
    rows: NDArray[np.intp] | slice,
    blocks: NDArray[np.intp] | slice,
) -> QuantTensor:
    """Some rows of a weight, and the numbers of their blocks of rows."""

    def part(numbers: NDArray[Any] | None, which: NDArray[np.intp] | slice) -> NDArray[Any] | None:
        return None if numbers is None else numbers[which]

    scale2, codebook = tensor.scale2, tensor.codebook
    return replace(
        tensor,
        format=form,
        codes=tensor.codes[rows],
        scale=part(tensor.scale, blocks),
        zero=part(tensor.zero, rows),
        offset=part(tensor.offset, rows),
        scale2=part(scale2, blocks) if scale2 is not None and scale2.ndim == 2 else scale2,
        codebook=part(codebook, rows) if codebook is not None and codebook.ndim == 2 else codebook,
    )


def dense_values(tensor: QuantTensor, dtype: str) -> NDArray[np.generic]:
    """What ``dequantize`` gives as numbers of ``dtype``, made a few rows at a time."""
    fmt = tensor.format
    plain = fmt.kind == "dense" and tensor.input is None
    values = np.empty(fmt.shape, numpy_dtype(dtype))
    columns = int(np.prod(fmt.shape[1:])) * fmt.rows

    def decode(blocks: slice) -> None:
        start, stop = blocks.start * fmt.rows, min(blocks.stop * fmt.rows, fmt.shape[0])
        part = row_slice(tensor, start, stop)
        values[start:stop] = part.codes if plain else part.dequantize()

    in_parallel(decode, row_chunks(-(-fmt.shape[0] // fmt.rows), columns, _CHUNK))
    return values


def _joint_name(names: Sequence[str]) -> str:
    """``a.q_proj.weight`` and ``a.k_proj.weight`` make ``a.q_proj+k_proj.weight``."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) != 1:
        return "+".join(names)
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    return ".".join("+".join(column) for column in columns)


def _largest(scales: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """The input scale of weights that read one x: the largest, by which no part of x saturates."""
    present = [scale for scale in scales if scale is not None]
    return np.max(present, axis=0) if present else None


def _scale2(tensor: QuantTensor) -> NDArray[np.float32] | None:
    """``[ceil(N/rows), 1]``; None for a weight without scales, or whose scales are exponents."""
    exponents = tensor.format.dtype == "float8_e8m0fnu" and tensor.scale2 is None
    if tensor.scale is None or tensor.format.kind != "float4_e2m1" or exponents:
        return None
    one = np.ones(1, np.float32) if tensor.scale2 is None else tensor.scale2
    return np.broadcast_to(np.asarray(one, np.float32), (len(tensor.scale), 1))


def _codebook(tensor: QuantTensor) -> NDArray[np.float32] | None:
    """``[N, 16]``."""
    if tensor.codebook is None:
        return None
    return np.broadcast_to(tensor.codebook, (tensor.format.shape[0], 16))


def _shared(tables: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """Rows of numbers of all weights; only one where they are all alike."""
    joined = _join(tables)
    alike = joined is not None and (joined == joined[:1]).all()
    return joined[0] if joined is not None and alike else joined


def _join(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
