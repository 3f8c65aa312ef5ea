"""The one representation of a weight, quantized or dense, between checkpoint, algorithms and
packers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Kind = Literal["dense", "int", "float8_e4m3"]
ZeroKind = Literal["midpoint", "zero", "offset"]
Activation = Literal["none", "token", "static", "group"]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What is known of a weight without reading its data.

    ``zero`` says how an integer code becomes a number: ``midpoint`` is ``(q - 2**(bits-1)) *
    scale``, ``zero`` is ``(q - zero) * scale`` and ``offset`` is ``q * scale + offset``. ``group``
    is the number of consecutive elements along K, and ``rows`` of rows, that share a scale; a
    weight with one scale a row has ``group`` = K. ``dtype`` is the element type of a dense weight
    and the type of the scales of a quantized one, as a NumPy / ml_dtypes name. ``activation`` says
    how x is rounded to the type of the codes where a kernel multiplies in that type: not at all, by
    one scale a token, by the weight's own ``input_scale``, or by one scale a token and group of K.
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
class QuantTensor:
    """A weight ``[N, K]`` (a dense one may have any rank) as codes and the numbers that decode
    them.

    codes   dense: the values. int, 4 bits: u8 ``[N, ceil(K/2)]``, low nibble = even k; 8 bits: u8
            ``[N, K]``.
    scale   ``[N, K/group]`` multipliers.
    zero    u8 ``[N, K/group]`` when ``format.zero == "zero"``.
    offset  float ``[N, K/group]`` when ``format.zero == "offset"``.
    input_scale  float32 ``[1]`` when ``format.activation == "static"``.
    """

    name: str
    format: WeightFormat
    codes: NDArray[np.generic]
    scale: NDArray[np.generic] | None = None
    zero: NDArray[np.uint8] | None = None
    offset: NDArray[np.generic] | None = None
    input_scale: NDArray[np.float32] | None = None

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

    def dequantize(self) -> NDArray[np.float32]:
        """The weight as float32 in its full shape."""
        if self.format.kind == "dense":
            return self.codes.astype(np.float32)
        assert self.scale is not None, self.format
        n, k = self.format.shape
        if self.format.kind == "float8_e4m3":
            spread = np.repeat(self.scale.astype(np.float32), self.format.rows, axis=0)[:n]
            spread = np.repeat(spread, self.format.group, axis=1)[:, :k]
            return np.asarray(self.codes.astype(np.float32) * spread, np.float32)
        groups = self.unpacked_codes().astype(np.float32).reshape(n, k // self.format.group, -1)
        scale = self.scale.astype(np.float32)[..., None]
        if self.format.zero == "offset":
            assert self.offset is not None
            out = groups * scale + self.offset.astype(np.float32)[..., None]
        else:
            zero = (
                2.0 ** (self.format.bits - 1)
                if self.zero is None
                else self.zero[..., None].astype(np.float32)
            )
            out = (groups - zero) * scale
        return np.asarray(out, np.float32).reshape(n, k)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A weight that is read (memory-mapped, converted, quantized) only when ``load`` is called."""

    name: str
    format: WeightFormat
    load: Callable[[], QuantTensor] = field(repr=False)


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The dtype of a NumPy or ml_dtypes name, such as ``float32`` or ``bfloat16``."""
    return np.dtype(getattr(ml_dtypes, name, name))


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """u8 ``[N, K]`` of 0..15 to u8 ``[N, ceil(K/2)]``, low nibble = even k."""
    n, k = codes.shape
    if k % 2:
        codes = np.concatenate([codes, np.zeros((n, 1), np.uint8)], axis=1)
    return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << 4), np.uint8)


def stack_rows(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Weights of one format (but for their rows) as one, rows in order; biases likewise along
    their only axis."""
    first = tensors[0].format
    rows = sum(tensor.format.shape[0] for tensor in tensors)
    name = _joint_name([tensor.name for tensor in tensors])
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
        )

    return LazyTensor(name, replace(first, shape=shape), load)


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


def _join(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
