"""The packed blob of a weight: lossless, as large as announced, and laid out as told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plugins.linear.weights import random_weight

from slipstream.plugins.linear.cpu.packing import can_pack, pack, packed_size, unpack
from slipstream.weights.tensor import (
    QuantTensor,
    WeightFormat,
    ZeroKind,
    numpy_dtype,
    pack_nibbles,
)

DENSE = ("float32", "float16", "bfloat16")


def assert_equal(a: QuantTensor, b: QuantTensor) -> None:
    np.testing.assert_array_equal(a.codes, b.codes)
    for name in ("scale", "zero", "offset"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@st.composite
def formats(draw: st.DrawFn) -> tuple[WeightFormat, bool]:
    gated = draw(st.booleans())
    rows = draw(st.integers(1, 70)) * (2 if gated else 1)
    group = draw(st.sampled_from([16, 32, 64, 96, 128]))
    fmt = WeightFormat(
        shape=(rows, max(group, 32) * draw(st.integers(1, 5))),
        kind="int",
        dtype=draw(st.sampled_from(["float16", "float32"])),
        bits=8 if group == 16 else draw(st.sampled_from([4, 8])),
        group=group,
        zero="midpoint" if group == 16 else draw(st.sampled_from(["midpoint", "zero", "offset"])),
    )
    return fmt, gated


@settings(max_examples=60, deadline=None)
@given(formats(), st.integers(0, 2**31))
def test_round_trip_is_exact(case: tuple[WeightFormat, bool], seed: int) -> None:
    fmt, gated = case
    weight = random_weight(fmt, seed)
    before = weight.codes.copy()
    blob = pack(weight, gated)
    assert blob.dtype == np.uint8 and blob.shape == (packed_size(fmt, gated),)
    assert_equal(unpack(blob, fmt, gated), weight)
    np.testing.assert_array_equal(weight.codes, before)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DENSE)
def test_round_trip_of_dense_weights(dtype: str, gated: bool) -> None:
    for shape in ((2, 1), (34, 63), (70, 5000)):
        weight = random_weight(WeightFormat(shape, "dense", dtype))
        blob = pack(weight, gated)
        assert blob.dtype == np.uint8 and blob.shape == (packed_size(weight.format, gated),)
        back = unpack(blob, weight.format, gated)
        assert back.codes.dtype == weight.codes.dtype
        np.testing.assert_array_equal(back.codes, weight.codes)


def test_pairs_of_bfloat16_stand_side_by_side() -> None:
    values = np.arange(32 * 4, dtype=np.float32).reshape(32, 4).astype(numpy_dtype("bfloat16"))
    tiles = pack(QuantTensor("w", WeightFormat((32, 4), "dense", "bfloat16"), values))
    pairs = tiles.view(values.dtype).reshape(2, 2, 16, 2)
    for row, k in ((0, 0), (5, 3), (31, 2)):
        assert pairs[row // 16, k // 2, row % 16, k % 2] == values[row, k]


@pytest.mark.parametrize("gated", [False, True])
def test_round_trip_of_float4(gated: bool) -> None:
    """Of any scales, which come back as float32, with the second one in them."""
    for form in ("float8_e8m0fnu", "float8_e4m3fn"):
        weight = random_weight(WeightFormat((40, 192), "float4_e2m1", form, 4, 64))
        weight = replace(weight, scale2=np.array([0.37], np.float32))
        back = unpack(pack(weight, gated), weight.format, gated)
        np.testing.assert_array_equal(back.codes, weight.codes)
        np.testing.assert_array_equal(back.dequantize(), weight.dequantize())


def test_round_trip_over_several_chunks() -> None:
    fmt = WeightFormat((1600, 4096), "int", "float16", 4, 128, "zero")
    for gated in (False, True):
        weight = random_weight(fmt)
        assert_equal(unpack(pack(weight, gated), fmt, gated), weight)


@pytest.mark.parametrize(
    ("bits", "zero", "bytes_per_code"), [(4, "offset", 0.625), (8, "midpoint", 1.0625)]
)
def test_size_is_that_of_the_numbers(bits: int, zero: ZeroKind, bytes_per_code: float) -> None:
    """GGUF's Q4_1 and Q8_0 take no more room packed than in their file."""
    fmt = WeightFormat((49152, 576), "int", "float16", bits, 32, zero)
    assert packed_size(fmt) == int(49152 * 576 * bytes_per_code)


def test_layout_of_nibbles() -> None:
    fmt = WeightFormat((16, 32), "int", "float16", 4, 32)
    codes = np.random.default_rng(0).integers(0, 16, (16, 32), dtype=np.uint8)
    weight = QuantTensor("w", fmt, pack_nibbles(codes), np.ones((16, 1), np.float16))
    tile = pack(weight)[:256].reshape(4, 16, 4)
    for pair, row, i in ((0, 0, 0), (1, 5, 3), (3, 15, 2)):
        assert tile[pair, row, i] == codes[row, 8 * pair + i] | codes[row, 8 * pair + 4 + i] << 4


def test_gated_tiles_alternate() -> None:
    fmt = WeightFormat((64, 32), "int", "float32", 8, 32)
    weight = random_weight(fmt)
    tiles = pack(weight, gated=True).reshape(4, -1)
    plain = pack(weight).reshape(4, -1)
    np.testing.assert_array_equal(tiles, plain[[0, 2, 1, 3]])


def test_bfloat16_scales_are_kept_exactly() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    fmt = WeightFormat((16, 64), "int", "bfloat16", 4, 32)
    scale = np.geomspace(1e-30, 1e30, 32).reshape(16, 2).astype(ml_dtypes.bfloat16)
    weight = QuantTensor("w", fmt, np.zeros((16, 32), np.uint8), scale)
    np.testing.assert_array_equal(unpack(pack(weight), fmt).scale, scale.astype(np.float32))


def test_can_pack() -> None:
    good = WeightFormat((8, 576), "int", "float16", 4, 64)
    assert can_pack(good) and can_pack(replace(good, bits=8, group=576))
    assert not can_pack(replace(good, group=16))
    assert not can_pack(replace(good, group=128))
    assert not can_pack(replace(good, bits=3))
    for dtype in DENSE:
        assert can_pack(WeightFormat((8, 577), "dense", dtype))
    assert not can_pack(WeightFormat((8, 577), "dense", "float64"))
    assert not can_pack(WeightFormat((8,), "dense", "float32"))
