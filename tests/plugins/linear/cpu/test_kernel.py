"""The quantized Linear and Embedding kernels against their NumPy reference."""

from __future__ import annotations

from typing import TypedDict

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.plugins.linear import native
from tests.plugins.linear.weights import random_weight

from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.linear import reference
from slipstream.plugins.linear.cpu.packing import pack
from slipstream.weights.tensor import QuantTensor, WeightFormat, ZeroKind, pack_nibbles

Floats = NDArray[np.float32]

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64)
SHAPES = ((50, 64), (34, 576), (18, 1536))
ZEROS: tuple[ZeroKind, ...] = ("midpoint", "zero", "offset")


class Options(TypedDict, total=False):
    bias: Floats
    residual: Floats
    norm_weight: Floats
    norm_eps: float


def normal(*shape: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def assert_close(got: Floats, want: Floats) -> None:
    """Within 1e-5 of the size of the outputs: float32 sums against float64 ones; what a closed gate
    lets through may be next to nothing instead of nothing."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(float(np.abs(want).max()), 1e-6))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", [4, 8])
def test_matches_reference(isa: str, bits: int, zero: ZeroKind, dtype: str) -> None:
    narrow = [16] if (bits, zero) == (8, "midpoint") else []
    for n, k in SHAPES:
        for group in (g for g in (*narrow, 32, 64, 128, k) if k % g == 0):
            weight = random_weight(WeightFormat((n, k), "int", dtype, bits, group, zero))
            blob = pack(weight)
            packed = native.packed_weight(blob, weight.format)
            x = normal(max(BATCHES), k)
            want = reference.linear(x, weight, activation="block")
            for rows in BATCHES:
                got = native.linear(x[:rows], packed, isa)
                assert_close(got, want[:rows])


@pytest.mark.parametrize("group", [32, 64])
def test_float4_matches_reference(isa: str, group: int) -> None:
    weight = random_weight(WeightFormat((34, 576), "float4_e2m1", "float8_e8m0fnu", 4, group))
    x, packed = normal(17, 576), native.packed_weight(pack(weight), weight.format)
    want = reference.linear(x, weight, activation="block")
    for rows in (1, 3, 8, 17):
        assert_close(native.linear(x[:rows], packed, isa), want[:rows])
    ids = np.arange(34, dtype=np.int32)
    np.testing.assert_array_equal(native.embedding(ids, packed, isa), weight.dequantize())


@pytest.mark.parametrize("copies", [1, 16])
def test_the_largest_of_float4_do_not_saturate(isa: str, copies: int) -> None:
    """Every product at its largest, with either sign: exact in integers."""
    fmt = WeightFormat((32, 64), "float4_e2m1", "float8_e8m0fnu", 4, 32)
    codes = np.full((32, 64), 7, np.uint8)
    codes[16:] = 15  # -6
    ones = np.full((32, 2), 127, np.uint8).view(ml_dtypes.float8_e8m0fnu)
    weight = QuantTensor("w", fmt, pack_nibbles(codes), ones)
    low = np.where(np.arange(64) % 32, np.float32(-128), np.float32(127))
    x = np.stack([low, -1 - low] * copies)  # scales of one: codes are -128 and 127 only
    got = native.linear(x, native.packed_weight(pack(weight), fmt), isa)
    np.testing.assert_array_equal(got, x @ weight.dequantize().T)


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("names", ["", "bias", "residual", "norm", "bias residual norm"])
def test_prologue_and_epilogues(isa: str, names: str, gate: str | None) -> None:
    gated, kind = gate is not None, GATES[gate or "silu"]
    for n, k in SHAPES:
        weight = random_weight(WeightFormat((n, k), "int", "float16", 4, 32, "offset"))
        blob = pack(weight, gated)
        packed = native.packed_weight(blob, weight.format, gated)
        for rows in BATCHES:
            options = Options()
            if "bias" in names:
                options["bias"] = normal(n)
            if "residual" in names:
                options["residual"] = normal(rows, n // 2 if gated else n, seed=2)
            if "norm" in names:
                options["norm_weight"], options["norm_eps"] = normal(k, seed=3), 1e-5
            x = 3 * normal(rows, k)
            got = native.linear(x, packed, isa, gate=kind, **options)
            want = reference.linear(
                x, weight, gated=gated, gate=kind, activation="block", **options
            )
            assert_close(got, want)


@pytest.mark.parametrize(
    ("bits", "zero", "group"),
    [(4, "offset", 64), (4, "zero", 64), (8, "midpoint", 64), (8, "midpoint", 16)],
)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(
    isa: str, bits: int, zero: ZeroKind, group: int
) -> None:
    n, k, rows = 82, 1536, 400  # enough tokens for several blocks, tasks and cache chunks
    weight = random_weight(WeightFormat((n, k), "int", "float16", bits, group, zero))
    blob = pack(weight, gated=True)
    packed = native.packed_weight(blob, weight.format, gated=True)
    x, bias, norm = normal(rows, k), normal(n), normal(k)
    whole = native.linear(x, packed, isa, bias=bias, norm_weight=norm, norm_eps=1e-6)
    alone = native.linear(x, packed, isa, bias=bias, norm_weight=norm, norm_eps=1e-6, threads=1)
    np.testing.assert_array_equal(whole, alone)
    for count in BATCHES:
        for first in (0, 37, rows - count):
            part = slice(first, first + count)
            few = native.linear(x[part], packed, isa, bias=bias, norm_weight=norm, norm_eps=1e-6)
            np.testing.assert_array_equal(few, whole[part])


@pytest.mark.parametrize("copies", [1, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_do_not_saturate(isa: str, bits: int, copies: int) -> None:
    """Every product at its largest, with either sign: exact in integers."""
    n, k = 16, 64
    fmt = WeightFormat((n, k), "int", "float32", bits, 32, "zero")
    codes = np.full((n, k), 2**bits - 1, np.uint8)
    ones, zeros = np.ones((n, 2), np.float32), np.zeros((n, 2), np.uint8)
    blob = pack(QuantTensor("w", fmt, pack_nibbles(codes) if bits == 4 else codes, ones, zeros))
    low = np.where(np.arange(k) % 32, np.float32(-128), np.float32(127))
    x = np.stack([low, -1 - low, low + 128] * copies)  # scales of one: codes are -128 and 127 only
    got = native.linear(x, native.packed_weight(blob, fmt), isa)
    want = (2**bits - 1) * x.sum(axis=1)
    np.testing.assert_array_equal(got, np.broadcast_to(want[:, None], (len(x), n)))


def test_activations_span_the_codes_of_their_block() -> None:
    x = np.random.default_rng(0).gamma(2, 1, (7, 96)).astype(np.float32) - 0.3
    codes, scale, centre = reference.quantize_activations(x)
    blocks = codes.reshape(7, 3, 32)
    assert (blocks.min(axis=-1) == -128).all() and (blocks.max(axis=-1) == 127).all()
    error = np.abs(blocks * scale[..., None] + centre[..., None] - x.reshape(7, 3, 32))
    assert (error <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize("zero", ZEROS)
def test_equal_values_are_exact(isa: str, zero: ZeroKind) -> None:
    """No quantization error at all, at any size; zeros give exactly zero."""
    weight = random_weight(WeightFormat((18, 64), "int", "float16", 4, 32, zero))
    blob = pack(weight)
    sizes = np.array([0.0, -0.0, 1e-35, 0.1, -123.4, 7e30], np.float32)
    x = np.repeat(sizes, 64).reshape(-1, 64)
    got = native.linear(x, native.packed_weight(blob, weight.format), isa)
    want = np.outer(sizes.astype(np.float64), weight.dequantize().sum(axis=1, dtype=np.float64))
    np.testing.assert_array_equal(got[:2], 0)
    np.testing.assert_allclose(got[2:], want[2:], rtol=1e-4)


def test_not_a_number_reaches_its_own_token_only(isa: str) -> None:
    weight = random_weight(WeightFormat((32, 96), "int", "float16", 4, 32, "midpoint"))
    blob = pack(weight)
    packed = native.packed_weight(blob, weight.format)
    x = normal(9, 96)
    clean = native.linear(x, packed, isa)
    x[1, 40], x[3, 95], x[4, 64:] = np.nan, np.inf, 0.0
    x[6, 0], x[7, 63], x[8] = -np.inf, -np.nan, np.inf
    got = native.linear(x, packed, isa)
    assert np.isnan(got[[1, 3, 6, 7, 8]]).all()
    np.testing.assert_array_equal(got[[0, 2, 5]], clean[[0, 2, 5]])
    assert np.isfinite(got[4]).all()
    np.testing.assert_array_equal(
        np.isnan(reference.linear(x, weight, activation="block")), np.isnan(got)
    )


def test_tiny_and_huge_values_stay_finite(isa: str) -> None:
    weight = random_weight(WeightFormat((32, 64), "int", "float16", 8, 32, "midpoint"))
    blob = pack(weight)
    for size in (1e-45, 1e-38, 1e-30, 1e30):
        x = normal(4, 64) * np.float32(size)
        got = native.linear(x, native.packed_weight(blob, weight.format), isa)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(
            got, reference.linear(x, weight, activation="block"), rtol=1e-3, atol=32 * size
        )


def test_residual_may_be_the_output(isa: str) -> None:
    """The kernel reads a residual element before it writes the same element."""
    weight = random_weight(WeightFormat((50, 64), "int", "float16", 4, 32, "midpoint"))
    blob = pack(weight)
    x, residual = normal(5, 64), normal(5, 50)
    want = native.linear(x, native.packed_weight(blob, weight.format), isa, residual=residual)
    packed = native.packed_weight(blob, weight.format)
    native.linear_into(residual, x, packed, isa, residual)
    np.testing.assert_array_equal(residual, want)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", [4, 8])
def test_embedding(isa: str, bits: int, zero: ZeroKind, dtype: str) -> None:
    narrow = [16] if (bits, zero) == (8, "midpoint") else []
    for group in (*narrow, 32, 96):
        weight = random_weight(WeightFormat((50, 96), "int", dtype, bits, group, zero))
        blob = pack(weight)
        for rows in (1, 4, 50):
            ids = np.random.default_rng(rows).integers(0, 50, rows).astype(np.int32)
            ids[0] = 49
            got = native.embedding(ids, native.packed_weight(blob, weight.format), isa)
            np.testing.assert_allclose(got, reference.embedding(ids, weight), rtol=1e-6, atol=1e-7)


def test_zero_points_may_lie_beyond_the_codes(isa: str) -> None:
    """Some GPTQ files have a zero point of 16 in 4 bits."""
    weight = random_weight(WeightFormat((50, 96), "int", "float16", 4, 32, "zero"))
    assert weight.zero is not None
    weight.zero[::3] = 16
    packed = native.packed_weight(blob := pack(weight), weight.format)
    assert blob.size
    x = normal(5, 96)
    assert_close(native.linear(x, packed, isa), reference.linear(x, weight, activation="block"))


def test_subnormal_and_signed_half_scales(isa: str) -> None:
    fmt = WeightFormat((16, 32), "int", "float16", 4, 32, "offset")
    scale = np.array([[2.0**-24 * (i + 1)] for i in range(16)], np.float16)
    offset = np.array([[(-1.0) ** i * 2.0 ** (i - 20)] for i in range(16)], np.float16)
    codes = np.random.default_rng(0).integers(0, 16, (16, 32), dtype=np.uint8)
    weight = QuantTensor("w", fmt, pack_nibbles(codes), scale, None, offset)
    blob = pack(weight)
    ids = np.arange(16, dtype=np.int32)
    got = native.embedding(ids, native.packed_weight(blob, fmt), isa)
    np.testing.assert_allclose(got, weight.dequantize(), rtol=1e-6)
