from __future__ import annotations

import logging

import numpy as np
import pytest
from tests.programs import apply, parse
from tests.quantized_models import float8, integers

from slipstream.builder.graph.passes.dequantize_unheld import DequantizeUnheld
from slipstream.builder.graph.passes.round_activations import RoundActivations
from slipstream.weights.tensor import LazyTensor, QuantTensor

TWO = """g (float[T, 64] x, float[48, 64] a, float[16, 64] b) => (float[T, 48] y, float[T, 16] z) {
  y = slipstream.Linear <in_features = 64, out_features = 48> (x, a)
  z = slipstream.Linear <in_features = 64, out_features = 16> (x, b)
}"""
VALUES = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
A = integers(8, activation="static")("a", VALUES[:48])
B = float8(activation="token")("b", VALUES[:16])


def lazy(tensor: QuantTensor) -> LazyTensor:
    return LazyTensor(tensor.name, tensor.format, lambda: tensor)


def test_what_kernels_do_not_do_goes_out_of_the_formats(caplog: pytest.LogCaptureFixture) -> None:
    program = parse(TWO, lazy(A), lazy(B))
    with caplog.at_level(logging.INFO):
        transform = RoundActivations(lambda fmt: fmt.kind == "float8_e4m3", "not rounded")
        assert apply(program, transform) == [1]
    loaded = program.weights["a"].load()
    assert loaded.format == program.weights["a"].format
    assert loaded.format.activation == "none" and loaded.input_scale is None
    np.testing.assert_array_equal(loaded.dequantize(), A.dequantize())
    assert program.weights["b"].format == B.format
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "1 weights (a): activations rounded by a fixed scale in the checkpoint, here "
         "not rounded")
    ]  # fmt: skip


def test_the_dense_fallback_is_named(caplog: pytest.LogCaptureFixture) -> None:
    program = parse(TWO, lazy(A), lazy(B))
    transform = DequantizeUnheld(lambda fmt: fmt.kind == "int", "toaster", "bfloat16")
    with caplog.at_level(logging.WARNING):
        assert apply(program, transform) == [1]
    assert program.weights["a"].format == A.format
    made = program.weights["b"].load()
    assert (made.format.kind, made.format.dtype) == ("dense", "bfloat16")
    np.testing.assert_array_equal(made.codes, B.dequantize().astype(made.codes.dtype))
    assert caplog.messages == [
        "1 weights (b): target toaster has no kernel for float8_e4m3, a scale a row, activations "
        "rounded by token; they become bfloat16"
    ]
