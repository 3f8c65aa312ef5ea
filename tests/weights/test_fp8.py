"""FP8 weights against a rounding written out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.programs import dense

from slipstream.errors import CheckpointError
from slipstream.weights.fp8 import quantize_fp8
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, stack_rows

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NUMBERS = np.unique(E4M3[np.isfinite(E4M3)])


def lazy(values: NDArray[np.float32]) -> LazyTensor:
    form = WeightFormat(values.shape)
    return LazyTensor("w", form, lambda: QuantTensor("w", form, values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_is_scaled_to_448_and_rounded_to_the_nearest(dtype: str) -> None:
    weight = dense("w", 70, 96, dtype=dtype)
    values = weight.load().codes.astype(np.float64)
    got = quantize_fp8(weight)
    assert got.scale is not None and got.scale.shape == (70, 1)
    scale = got.scale.astype(np.float64)
    np.testing.assert_allclose(scale[:, 0], np.abs(values).max(axis=1) / 448, rtol=1e-6)
    scaled = values / scale
    distance = np.abs(NUMBERS[:, None, None] - scaled).min(axis=0)
    error = np.abs(got.codes.astype(np.float64) - scaled)
    np.testing.assert_allclose(error, distance, atol=1e-4)
    np.testing.assert_allclose(got.dequantize(), values, atol=np.abs(values).max() / 16)


def test_codes_are_those_of_ml_dtypes() -> None:
    """At every number, halfway between every two, and beside that."""
    numbers = np.sort(NUMBERS).astype(np.float32)
    halves = (numbers[1:] + numbers[:-1]) / np.float32(2)
    beside = [np.nextafter(halves, np.float32(far)) for far in (-1000, 1000)]
    # The first is the largest, so that the scale is 1.
    row = np.concatenate([[448], numbers, halves, *beside, [1e-30, -0.0]]).astype(np.float32)
    got = quantize_fp8(lazy(row[None])).codes[0]
    assert got.tobytes() == row.astype(ml_dtypes.float8_e4m3fn).tobytes()


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_a_searched_scale_is_the_best_of_its_octave(size: float) -> None:
    values = (np.random.default_rng(3).normal(0, size, (16, 256))).astype(np.float32)
    plain, searched = quantize_fp8(lazy(values)), quantize_fp8(lazy(values), search=True)

    def error(scale: NDArray[np.float32]) -> NDArray[np.float64]:
        codes = (values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.asarray((((codes * scale - values) / size) ** 2).sum(axis=1))

    assert plain.scale is not None and searched.scale is not None
    first = plain.scale.astype(np.float32)
    found = error(searched.scale.astype(np.float32))
    candidates = [error(first * np.float32(2 ** (i / 8))) for i in range(8)]
    np.testing.assert_allclose(found, np.min(candidates, axis=0), rtol=1e-4)
    assert found.sum() < 0.95 * candidates[0].sum()


@pytest.mark.parametrize("search", [False, True])
def test_rows_of_zeros_stay_zero(search: bool) -> None:
    got = quantize_fp8(lazy(np.zeros((2, 32), np.float32)), search=search)
    assert not got.dequantize().any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_undefined_numbers_are_refused(bad: float) -> None:
    values = np.ones((4, 32), np.float32)
    values[2, 5] = bad
    with pytest.raises(CheckpointError, match="tensor w holds infinite or undefined numbers"):
        quantize_fp8(lazy(values))


def test_blocks_are_decoded_with_partial_edges() -> None:
    rng = np.random.default_rng(0)
    codes = rng.normal(0, 50, (200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
    form = WeightFormat((200, 300), "float8_e4m3", "float32", 8, 128, rows=128)
    got = QuantTensor("w", form, codes, scale).dequantize()
    assert got[199, 299] == float(codes[199, 299]) * scale[1, 2]
    assert got[127, 128] == float(codes[127, 128]) * scale[0, 1]


def test_stacked_weights_take_the_largest_input_scale() -> None:
    form = WeightFormat((2, 32), "float8_e4m3", "float32", 8, 32, activation="static")
    parts = []
    for name, scale in (("q", 0.5), ("k", 2.0)):
        codes = np.ones((2, 32), ml_dtypes.float8_e4m3fn)
        scales = np.full((2, 1), scale, np.float32)
        tensor = QuantTensor(name, form, codes, scales, input_scale=np.array([scale], np.float32))
        parts.append(LazyTensor(name, form, lambda tensor=tensor: tensor))  # type: ignore[misc]
    stacked = stack_rows(parts).load()
    assert stacked.format.shape == (4, 32)
    np.testing.assert_array_equal(stacked.input_scale, [2.0])
    np.testing.assert_array_equal(stacked.dequantize()[:, 0], [0.5, 0.5, 2.0, 2.0])
