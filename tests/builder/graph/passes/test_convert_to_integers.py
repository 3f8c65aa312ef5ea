from __future__ import annotations

import logging

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.programs import apply, parse
from tests.quantized_models import NF4, Scheme, float4, float8, nf4, with_input

from slipstream.builder.graph.passes.convert_to_integers import ConvertToIntegers, integer_format
from slipstream.errors import CheckpointError
from slipstream.weights.rtn import quantize_rtn
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

LINEAR = """g (float[T, 256] x, float[300, 256] w) => (float[T, 300] y) {
  y = slipstream.Linear <in_features = 256, out_features = 300> (x, w)
}"""


def lazy(tensor: QuantTensor) -> LazyTensor:
    return LazyTensor("w", tensor.format, lambda: tensor, tensor.input)


def weight(scheme: Scheme) -> QuantTensor:
    return scheme("w", np.random.default_rng(0).normal(0, 0.1, (300, 256)).astype(np.float32))


def converted(tensor: QuantTensor) -> QuantTensor:
    program = parse(LINEAR, lazy(tensor))
    transform = ConvertToIntegers((tensor.format.kind,), lambda fmt: fmt.kind == "int")
    assert apply(program, transform) == [1]
    loaded = program.weights["w"].load()
    assert loaded.format == program.weights["w"].format
    assert (loaded.format.kind, loaded.format.bits, loaded.format.zero) == ("int", 8, "midpoint")
    return loaded


def test_float4_loses_nothing() -> None:
    tensor = weight(float4)
    got = converted(tensor)
    assert got.format.group == 16
    np.testing.assert_array_equal(got.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    "scheme", [float8(), float8(128, 128, activation="group"), float8(1, 64, activation="none")]
)
def test_large_float8_numbers_are_kept_and_small_ones_rounded(scheme: Scheme) -> None:
    tensor = weight(scheme)
    got, want = converted(tensor).dequantize(), tensor.dequantize()
    codes = np.abs(tensor.codes.astype(np.float32)).reshape(300, -1, 32)
    largest = codes.max(axis=-1, keepdims=True)
    kept = (codes >= largest / 8).reshape(want.shape)
    np.testing.assert_array_equal(got[kept], want[kept])
    assert 0.6 < kept.mean() < 1
    error = np.abs(got - want).reshape(300, -1, 32)
    group_max = np.abs(want).reshape(300, -1, 32).max(axis=-1, keepdims=True)
    assert (error <= group_max / 127.99).all()
    rounded = quantize_rtn(want, bits=8, group_size=32, symmetric=True, scale_dtype="float32")
    by_rounding = np.square(rounded.dequantize() - want).mean()
    assert np.square(error).mean() < 0.95 * by_rounding, "better than rounding to nearest"


def test_every_float8_number_alone_is_exact() -> None:
    bits = np.arange(256, dtype=np.uint8)
    numbers = bits[bits & 0x7F != 0x7F].view(ml_dtypes.float8_e4m3fn)
    codes = np.zeros((len(numbers), 32), ml_dtypes.float8_e4m3fn)
    codes[:, 5] = numbers
    fmt = WeightFormat(codes.shape, "float8_e4m3", "float32", 8, 32, activation="token")
    tensor = QuantTensor("w", fmt, codes, np.full((len(numbers), 1), 0.37, np.float32))
    target = integer_format(fmt)
    assert target is not None
    program = parse(
        "g (float[T, 32] x, float[254, 32] w) => (float[T, 254] y) {"
        "y = slipstream.Linear <in_features = 32, out_features = 254> (x, w) }",
        lazy(tensor),
    )
    apply(program, ConvertToIntegers(("float8_e4m3",), lambda fmt: fmt.kind == "int"))
    np.testing.assert_array_equal(program.weights["w"].load().dequantize(), tensor.dequantize())


def test_a_codebook_is_rounded_to_eight_bits() -> None:
    tensor = weight(nf4)
    got = converted(tensor)
    assert got.format.group == 64
    want = tensor.dequantize()
    largest = np.repeat(tensor.scale, 64, axis=1)  # type: ignore[arg-type]
    error: NDArray[np.float32] = np.abs(got.dequantize() - want) / largest
    assert error.max() < 0.5 / 64
    assert float(np.sqrt(np.square(error).mean())) < 0.3 / 100
    assert len(np.unique(got.codes)) == len(NF4)


def test_transforms_stay_and_the_log_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    tensor = weight(with_input(nf4, order=1))
    with caplog.at_level(logging.INFO):
        assert converted(tensor).input is tensor.input
    assert caplog.messages == [
        "1 weights (w): codebook of 16, groups of 64 becomes int8, groups of 64, "
        "where its numbers are rounded to 8 bits"
    ]


@pytest.mark.parametrize("fmt", [
    WeightFormat((4, 48), "float8_e4m3", "float32", 8, 48),
    WeightFormat((4, 64), "float8_e4m3", "float32", 8, 16),
    WeightFormat((4, 64), "int", "float32", 8, 16),
    WeightFormat((4, 64)),
])  # fmt: skip
def test_what_has_no_integers(fmt: WeightFormat) -> None:
    assert integer_format(fmt) is None


def test_a_damaged_float8_weight_is_named() -> None:
    tensor = weight(float8())
    tensor.codes.view(np.uint8)[7, 9] = 0x7F
    with pytest.raises(CheckpointError, match="tensor w holds undefined numbers"):
        converted(tensor)
