"""QuantTensor: nibble packing and what codes mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from slipstream.weights.safetensors import DTYPES
from slipstream.weights.tensor import (
    LazyTensor,
    QuantTensor,
    WeightFormat,
    is_finite,
    pack_nibbles,
    reorder_rows,
    reordered,
    stack_rows,
)

_SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, _SHAPES, elements=st.integers(0, 15)))
def test_four_bit_codes_survive_packing(codes: NDArray[np.uint8]) -> None:
    packed = pack_nibbles(codes)
    form = WeightFormat(codes.shape, "int", bits=4, group=32)

    assert packed.shape == (codes.shape[0], (codes.shape[1] + 1) // 2)
    np.testing.assert_array_equal(QuantTensor("w", form, packed).unpacked_codes(), codes)


def test_the_low_nibble_is_the_even_column() -> None:
    assert pack_nibbles(np.array([[1, 2, 3]], np.uint8)).tolist() == [[0x21, 0x03]]


def test_codes_mean_what_the_zero_kind_says() -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(1, 64)
    scale = np.array([[0.5, 2.0]], np.float16)
    zero = np.array([[3, 200]], np.uint8)
    offset = np.array([[-1.5, 0.25]], np.float16)

    def decoded(kind: str, at: int) -> float:
        form = WeightFormat((1, 64), "int", "float16", 8, 32, kind)  # type: ignore[arg-type]
        extra = {"zero": {"zero": zero}, "offset": {"offset": offset}}.get(kind, {})
        return float(QuantTensor("w", form, codes, scale, **extra).dequantize()[0, at])  # type: ignore[arg-type]

    assert decoded("midpoint", 5) == (5 - 128) * 0.5
    assert decoded("midpoint", 40) == (40 - 128) * 2.0
    assert decoded("zero", 5) == (5 - 3) * 0.5
    assert decoded("zero", 40) == (40 - 200) * 2.0
    assert decoded("offset", 5) == 5 * 0.5 - 1.5
    assert decoded("offset", 40) == 40 * 2.0 + 0.25


def test_dense_values_become_float32_of_any_rank() -> None:
    values = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)

    dense = QuantTensor("norm", WeightFormat((3,), "dense", "bfloat16"), values).dequantize()

    assert dense.dtype == np.float32
    assert dense.tolist() == [1.5, -2.0, 3.0]


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.kind in "fV"], ids=str)
def test_what_is_finite(dtype: np.dtype[Any]) -> None:
    """Every pattern of the leading 16 bits, against what NumPy finds."""
    size = min(dtype.itemsize, 2) * 8
    patterns = np.arange(1 << size, dtype=np.uint64) << np.uint64(8 * dtype.itemsize - size)
    values = patterns.astype(f"u{dtype.itemsize}").view(dtype)
    with np.errstate(all="ignore"):
        expected = np.isfinite(values.astype(np.float64) if dtype.itemsize == 1 else values)
    found = [is_finite(values[i : i + 1]) for i in range(0, len(values), 7 if size == 16 else 1)]
    np.testing.assert_array_equal(found, expected[:: 7 if size == 16 else 1])
    many = np.ones(100_000, dtype)
    assert is_finite(many) and is_finite(many[:0])
    many[-1] = np.nan
    assert not is_finite(many) and not is_finite(many.reshape(2, -1))


def _random(seed: int, rows: int, form: WeightFormat, **numbers: NDArray[np.float32]) -> LazyTensor:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, form.shape[1] // 2), np.uint8)
    scale = rng.uniform(0.5, 2, (rows, form.shape[1] // form.group)).astype(np.float32)
    tensor = QuantTensor("w", replace(form, shape=(rows, form.shape[1])), codes, scale, **numbers)  # type: ignore[arg-type]
    return LazyTensor("w", tensor.format, lambda: tensor)


@pytest.mark.parametrize("kind", ["float4_e2m1", "codebook"])
@pytest.mark.parametrize("alike", [True, False])
def test_stacked_weights_decode_as_each_did(kind: str, alike: bool) -> None:
    form = WeightFormat((0, 64), kind, "float32", 4, 16)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    books = [rng.normal(size=16).astype(np.float32) for _ in range(3)]
    seconds = [np.array([value], np.float32) for value in (0.25, 3, 7)]
    name, values = {"codebook": ("codebook", books)}.get(kind, ("scale2", seconds))
    chosen = [values[0] if alike else value for value in values]
    parts = [_random(i, 3 + i, form, **{name: value}) for i, value in enumerate(chosen)]
    stacked = stack_rows(parts).load()
    want = np.concatenate([part.load().dequantize() for part in parts])
    np.testing.assert_array_equal(stacked.dequantize(), want)
    few = np.array([4, 4, 0, 11])
    np.testing.assert_array_equal(reordered(stacked, few).dequantize(), want[few])
    shared = getattr(stacked, name)
    assert shared.shape == (values[0].shape if alike else (12, len(values[0])))


def test_a_stacked_weight_without_a_second_scale_has_one_of_one() -> None:
    form = WeightFormat((0, 64), "float4_e2m1", "float32", 4, 16)
    parts = [_random(0, 2, form), _random(1, 3, form, scale2=np.array([4], np.float32))]
    want = np.concatenate([part.load().dequantize() for part in parts])
    np.testing.assert_array_equal(stack_rows(parts).load().dequantize(), want)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize(
    "order",
    [[1, 0, 3, 2, 5, 4, 7, 6], [7, 0, 3, 2, 5, 4, 1, 6], [1, 0, 2], [5, 5, 3], [4, 5, 6, 7]],
)
def test_rows_in_another_order_decode_as_they_did(block: int, order: list[int]) -> None:
    """Where rows of several blocks come together, each gets a scale of its own; else blocks stay,
    wherever they go."""
    form = WeightFormat((8, 64), "int", "float32", 4, 16, rows=block)
    tensor = _random(0, 8, form).load()
    assert tensor.scale is not None
    tensor = replace(tensor, scale=tensor.scale[: 8 // block])
    moved = reorder_rows(LazyTensor("w", form, lambda: tensor), np.array(order))
    np.testing.assert_array_equal(moved.load().dequantize(), tensor.dequantize()[order])
    assert moved.format == moved.load().format
    blocks = [order[i : i + block] for i in range(0, len(order), block)]
    whole = all(len({row // block for row in rows}) == 1 for rows in blocks)
    assert moved.format.rows == (block if whole else 1)
