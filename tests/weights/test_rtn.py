"""Round-to-nearest quantization: nearest codes, exact zeros, and weights it must refuse."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from slipstream.errors import BuildError, CheckpointError
from slipstream.weights.rtn import Bits, ScaleDtype, largest_group, quantize_rtn
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

BITS = st.sampled_from([4, 8])
SCALES = st.sampled_from(["float16", "float32"])
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([32, 64, 96])),
    elements=st.floats(-1000, 1000, width=32),
)


def levels(tensor: QuantTensor) -> NDArray[np.float64]:
    """Every value that each group can express: ``[N, K/group, 2**bits]``."""
    assert tensor.scale is not None
    codes = np.arange(2**tensor.format.bits, dtype=np.float64)
    zero: Any = 2 ** (tensor.format.bits - 1)
    if tensor.zero is not None:
        zero = tensor.zero.astype(np.float64)[..., None]
    values: NDArray[np.float64] = (codes - zero) * tensor.scale.astype(np.float64)[..., None]
    return values


@settings(deadline=None)
@given(WEIGHTS, BITS, st.booleans(), SCALES)
def test_every_weight_gets_the_nearest_value_of_its_group(
    weight: NDArray[np.float32], bits: Bits, symmetric: bool, scale_dtype: ScaleDtype
) -> None:
    tensor = quantize_rtn(
        weight, bits=bits, group_size=32, symmetric=symmetric, scale_dtype=scale_dtype
    )

    assert tensor.scale is not None
    groups = weight.reshape(len(weight), -1, 32).astype(np.float64)
    error = np.abs(tensor.dequantize().reshape(groups.shape) - groups)
    nearest = np.abs(groups[..., None] - levels(tensor)[:, :, None, :]).min(axis=-1)
    step = np.abs(tensor.scale.astype(np.float64))[..., None]
    # A scale too small to be inverted makes its group zero, which is right to within 1e-36.
    vanished = 2**bits * float(np.finfo(np.float32).tiny)
    assert (error <= nearest + 1e-4 * step + vanished).all()
    # Saturation costs at most half a step more than rounding; 1 % is the rounding of the scale.
    # The last term is a float16 scale that has run out of bits.
    assert (error <= 1.01 * step + 2.0**-24 * 2**bits).all()


@settings(deadline=None)
@given(WEIGHTS, BITS, st.booleans())
def test_zero_stays_exactly_zero(weight: NDArray[np.float32], bits: Bits, symmetric: bool) -> None:
    weight[:, ::3] = 0

    tensor = quantize_rtn(weight, bits=bits, group_size=32, symmetric=symmetric)

    assert not tensor.dequantize()[:, ::3].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_already_on_a_grid_are_kept(bits: Bits, symmetric: bool) -> None:
    half = 2 ** (bits - 1)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (8, 128))
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    weight = (codes - half).astype(np.float32) * 0.25

    tensor = quantize_rtn(weight, bits=bits, group_size=32, symmetric=symmetric)

    np.testing.assert_array_equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_many_rows_are_quantized_like_each_alone(symmetric: bool) -> None:
    weight = np.random.default_rng(1).standard_normal((700, 1024)).astype(np.float32)
    before = weight.copy()

    whole = quantize_rtn(weight, bits=4, group_size=128, symmetric=symmetric)

    np.testing.assert_array_equal(weight, before)
    for row in (0, 255, 256, 699):
        alone = quantize_rtn(weight[row : row + 1], bits=4, group_size=128, symmetric=symmetric)
        np.testing.assert_array_equal(whole.codes[row], alone.codes[0])
        np.testing.assert_array_equal(whole.dequantize()[row], alone.dequantize()[0])


def test_the_format_says_what_was_made() -> None:
    weight = np.ones((2, 64), np.float32)

    symmetric = quantize_rtn(weight, bits=8, group_size=64, symmetric=True, scale_dtype="float32")
    asymmetric = quantize_rtn(weight, bits=4, group_size=32, symmetric=False, name="w")

    assert symmetric.format == WeightFormat((2, 64), "int", "float32", 8, 64, "midpoint")
    assert symmetric.codes.shape == (2, 64)
    assert symmetric.zero is None
    assert asymmetric.name == "w"
    assert asymmetric.format == WeightFormat((2, 64), "int", "float16", 4, 32, "zero")
    assert asymmetric.codes.shape == (2, 32)
    assert asymmetric.scale is not None
    assert asymmetric.scale.dtype == np.float16
    assert asymmetric.zero is not None
    assert asymmetric.zero.shape == (2, 2)


def test_a_lazy_tensor_is_read_dense_or_quantized() -> None:
    values = np.random.default_rng(2).standard_normal((4, 64)).astype(ml_dtypes.bfloat16)
    dense = QuantTensor("layer.weight", WeightFormat((4, 64), "dense", "bfloat16"), values)
    expected = quantize_rtn(
        values.astype(np.float32), bits=4, group_size=32, symmetric=True, scale_dtype="float32"
    )

    for stored in (dense, expected):
        lazy = LazyTensor("layer.weight", stored.format, lambda stored=stored: stored)  # type: ignore[misc]
        made = quantize_rtn(lazy, bits=4, group_size=32, symmetric=True, scale_dtype="float32")
        assert made.name == "layer.weight"
        np.testing.assert_allclose(made.dequantize(), expected.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, symmetric: bool) -> None:
    weight = np.ones((3, 64), np.float32)
    weight[2, 40] = bad

    with pytest.raises(CheckpointError, match=r"layers\.7\.weight holds infinite"):
        quantize_rtn(weight, bits=4, group_size=32, symmetric=symmetric, name="layers.7.weight")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_too_large_for_float16_is_refused(symmetric: bool) -> None:
    weight = np.full((1, 32), 3e38, np.float32)

    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        quantize_rtn(weight, bits=4, group_size=32, symmetric=symmetric)
    kept = quantize_rtn(weight, bits=4, group_size=32, symmetric=symmetric, scale_dtype="float32")
    np.testing.assert_allclose(kept.dequantize(), weight, rtol=0.13)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_below_any_scale_become_zero(scale_dtype: ScaleDtype, symmetric: bool) -> None:
    weight = np.full((1, 32), 1e-42, np.float32)

    tensor = quantize_rtn(
        weight, bits=4, group_size=32, symmetric=symmetric, scale_dtype=scale_dtype
    )

    assert np.abs(tensor.dequantize()).max() <= 1e-40


@pytest.mark.parametrize(
    ("shape", "bits", "group", "message"),
    [
        ((2, 64), 3, 32, "bits is 3"),
        ((2, 576), 4, 128, "group size 128 does not divide the 576 columns of tensor w; use 64"),
        ((2, 33), 4, 32, "use no quantization"),
        ((2, 64), 4, 0, "group size 0"),
        ((64,), 4, 32, r"shape \[64\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...],
    bits: Bits,
    group: int,
    message: str,
) -> None:
    with pytest.raises(BuildError, match=message):
        quantize_rtn(
            np.ones(shape, np.float32), bits=bits, group_size=group, symmetric=True, name="w"
        )


@pytest.mark.parametrize(
    ("k", "requested", "expected"),
    [
        (4096, 128, 128),
        (4096, 256, 256),
        (576, 128, 64),
        (576, 64, 64),
        (96, 128, 32),
        (96, 96, 96),
        (64, 32, 32),
        (100, 128, None),
        (48, 32, None),
    ],
)
def test_the_largest_group_that_divides(k: int, requested: int, expected: int | None) -> None:
    assert largest_group(k, requested) == expected
