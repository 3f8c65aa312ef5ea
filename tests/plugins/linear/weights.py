"""Random quantized weights for the tests of Linear."""

from __future__ import annotations

import numpy as np

from slipstream.weights.tensor import QuantTensor, WeightFormat, numpy_dtype, pack_nibbles


def random_weight(fmt: WeightFormat, seed: int = 0) -> QuantTensor:
    """Random codes, and scales that give weights of about one."""
    rng = np.random.default_rng(seed)
    n, k = fmt.shape
    if fmt.kind == "float4_e2m1":
        return random_float4(fmt, rng)
    if fmt.kind != "int":
        return _random_float_weight(fmt, rng)
    shape = (n, k // fmt.group)
    codes = rng.integers(0, 2**fmt.bits, (n, k), dtype=np.uint8)
    zero = rng.integers(0, 2**fmt.bits, shape, dtype=np.uint8) if fmt.zero == "zero" else None
    offset = rng.normal(0, 0.1, shape).astype(fmt.dtype) if fmt.zero == "offset" else None
    scale = (rng.uniform(0.1, 1, shape) / 2**fmt.bits).astype(fmt.dtype)
    return QuantTensor(
        "w", fmt, pack_nibbles(codes) if fmt.bits == 4 else codes, scale, zero, offset
    )


def random_float4(fmt: WeightFormat, rng: np.random.Generator) -> QuantTensor:
    """Every code, and exponents around that of a thirty-second."""
    n, k = fmt.shape
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    exponents = rng.integers(120, 124, (n, k // fmt.group), dtype=np.uint8)
    return QuantTensor("w", fmt, pack_nibbles(codes), exponents.view(numpy_dtype(fmt.dtype)))


def _random_float_weight(fmt: WeightFormat, rng: np.random.Generator) -> QuantTensor:
    values = rng.normal(0, 0.3, fmt.shape).astype(np.float32)
    if fmt.kind == "dense":
        return QuantTensor("w", fmt, values.astype(numpy_dtype(fmt.dtype)))
    n, k = fmt.shape
    codes = (values * 100).astype(numpy_dtype("float8_e4m3fn"))
    shape = (-(-n // fmt.rows), -(-k // fmt.group))
    scale = rng.uniform(0.005, 0.02, shape).astype(np.float32)
    static = np.array([0.02], np.float32) if fmt.activation == "static" else None
    return QuantTensor("w", fmt, codes, scale, input_scale=static)
