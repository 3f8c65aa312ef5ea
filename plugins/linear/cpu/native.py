"""The compiled kernels of quantized Linear and Embedding, called without a session."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins import library
from slipstream.plugins.linear import ZERO_KINDS
from slipstream.plugins.linear.cpu.packing import packed_size, scale_bytes
from slipstream.weights.tensor import WeightFormat

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class PackedWeight(ctypes.Structure):
    """``PackedWeight`` of cpu.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("scale_bytes", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    )


class LinearArgs(ctypes.Structure):
    """``LinearArgs`` of cpu.h."""

    _fields_ = (
        ("weight", PackedWeight),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
    )


class EmbeddingArgs(ctypes.Structure):
    """``EmbeddingArgs`` of cpu.h."""

    _fields_ = (
        ("weight", PackedWeight),
        ("token_ids", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
    )


def packed_weight(blob: Bytes, fmt: WeightFormat, gated: bool = False) -> PackedWeight:
    """The structure of a blob made by ``pack``; the blob must outlive it."""
    assert (
        blob.dtype == np.uint8 and blob.flags.c_contiguous and blob.size == packed_size(fmt, gated)
    )
    n, k = fmt.shape
    return PackedWeight(
        blob.ctypes.data, k, n, fmt.bits, fmt.group, ZERO_KINDS[fmt.zero], scale_bytes(fmt), gated
    )


def _pointer(array: Floats | None, shape: tuple[int, ...]) -> int | None:
    if array is None:
        return None
    assert array.dtype == np.float32 and array.shape == shape and array.flags.c_contiguous, (
        array.shape,
        shape,
    )
    return array.ctypes.data


def _entry(name: str) -> Callable[..., int]:
    function: Any = getattr(library.load(), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def linear(
    x: Floats,
    weight: PackedWeight,
    isa: str,
    *,
    threads: int = 2,
    bias: Floats | None = None,
    residual: Floats | None = None,
    norm_weight: Floats | None = None,
    norm_eps: float = 0.0,
) -> Floats:
    """``reference.linear`` by the kernel of one instruction set, a name in ``library.isas()``."""
    tokens = x.shape[0]
    outputs = weight.out_features // 2 if weight.gated else weight.out_features
    y = np.full((tokens, outputs), np.nan, np.float32)
    args = LinearArgs(
        weight,
        _pointer(x, (tokens, weight.in_features)),
        _pointer(bias, (weight.out_features,)),
        _pointer(residual, (tokens, outputs)),
        _pointer(norm_weight, (weight.in_features,)),
        y.ctypes.data,
        tokens,
        norm_eps,
    )
    run_linear(args, isa, threads)
    return y


def run_linear(args: LinearArgs, isa: str, threads: int = 2) -> None:
    """The kernel on arguments that the caller has filled and keeps alive."""
    status = _entry("slipstream_linear")(ctypes.byref(args), isa.encode(), threads)
    assert status == 0, f"this library or machine has no {isa}"


def embedding(
    ids: NDArray[np.int32], weight: PackedWeight, isa: str, *, threads: int = 2
) -> Floats:
    """``reference.embedding`` by the kernel of one instruction set."""
    assert ids.dtype == np.int32 and ids.flags.c_contiguous
    y = np.full((ids.size, weight.in_features), np.nan, np.float32)
    args = EmbeddingArgs(weight, ids.ctypes.data, y.ctypes.data, ids.size)
    status = _entry("slipstream_embedding")(ctypes.byref(args), isa.encode(), threads)
    assert status == 0, f"this library or machine has no {isa}"
    return y
