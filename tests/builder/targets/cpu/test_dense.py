from __future__ import annotations

import numpy as np
import pytest
from tests.programs import apply, assert_close, dense, feeds, grouped, listing, outputs, parse
from tests.programs import run_onnxruntime as run

from slipstream.builder.targets.cpu.dense import (
    SetDenseType,
    lower_dense_embedding,
    lower_dense_linear,
    store_dense_weights,
)
from slipstream.builder.targets.cpu.matmul_nbits import lower_matmul_nbits
from slipstream.builder.targets.cpu.packed import pack_linear
from slipstream.weights.tensor import numpy_dtype

LINEAR = """g (float[T, 64] x, float[48, 64] w, float[48] b) => (float[T, 48] y) {
  y = slipstream.Linear <in_features = 64, out_features = 48> (x, w, b)
}"""
EMBEDDING = """g (int32[T] ids, float[320, 64] e) => (float[T, 64] y) {
  y = slipstream.Embedding <in_features = 64, out_features = 320> (ids, e)
}"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_linear_becomes_a_float32_gemm(dtype: str) -> None:
    program = parse(LINEAR, dense("w", 48, 64, dtype=dtype), dense("b", 48, dtype=dtype))
    inputs, want = feeds(program), outputs(program)
    assert apply(program, lower_dense_linear, store_dense_weights) == [1, 1]
    assert listing(program) == ["y = Gemm(x, w.float32, b.float32) transB=1"]
    assert not program.weights and list(program.stored) == ["w.float32", "b.float32"]
    assert_close(run(program, inputs), want, 1e-6)


def test_a_linear_without_bias_is_a_gemm_of_two_inputs() -> None:
    program = parse(LINEAR.replace(", float[48] b", "").replace(", b)", ")"), dense("w", 48, 64))
    inputs, want = feeds(program), outputs(program)
    assert lower_dense_linear(program) == 1
    assert listing(program) == ["y = Gemm(x, w.float32) transB=1"]
    assert_close(run(program, inputs), want, 1e-6)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_dense_matrices_get_the_type_asked_for(dtype: str) -> None:
    weight = dense("w", 48, 64)
    program = parse(LINEAR, weight, dense("b", 48))
    assert SetDenseType(dtype)(program) == (dtype in ("float16", "bfloat16"))
    kept = "float32" if dtype == "auto" else dtype
    assert program.weights["w"].format.dtype == kept
    assert program.weights["b"].format.dtype == "float32"
    numbers = program.weights["w"].load().codes
    np.testing.assert_array_equal(numbers, weight.load().codes.astype(numpy_dtype(kept)))
    assert SetDenseType(dtype)(parse(LINEAR, grouped("w", 48, 64), dense("b", 48))) == 0


def test_a_format_without_a_kernel_is_dequantized() -> None:
    weight = grouped("w", 48, 64, group=16)
    program = parse(LINEAR, weight, dense("b", 48))
    inputs = feeds(program)
    assert pack_linear(program) == 0
    assert apply(program, lower_dense_linear, store_dense_weights)[0] == 1
    want = inputs["x"] @ weight.load().dequantize().T + dense("b", 48).load().dequantize()
    assert_close(run(program, inputs), {"y": want})


def test_what_is_lowered_already_is_left_alone() -> None:
    for lower in (pack_linear, lower_matmul_nbits):
        program = parse(LINEAR, grouped("w", 48, 64), dense("b", 48))
        assert lower(program) == 1
        before = listing(program)
        assert lower_dense_linear(program) == 0
        assert listing(program) == before


def test_embedding_becomes_gather() -> None:
    program = parse(EMBEDDING, dense("e", 320, 64, dtype="bfloat16"))
    inputs, want = feeds(program), outputs(program)
    assert lower_dense_embedding(program) == 1
    assert listing(program) == ["y = Gather(e.float32, ids) axis=0"]
    np.testing.assert_array_equal(run(program, inputs)["y"], want["y"])


def test_a_tied_weight_is_stored_once() -> None:
    program = parse(
        """g (int32[T] ids, float[320, 64] e) => (float[T, 320] y) {
          x = slipstream.Embedding <in_features = 64, out_features = 320> (ids, e)
          y = slipstream.Linear <in_features = 64, out_features = 320> (x, e)
        }""",
        dense("e", 320, 64),
    )
    inputs, want = feeds(program), outputs(program)
    assert lower_dense_linear(program) == lower_dense_embedding(program) == 1
    assert list(program.stored) == ["e.float32"]
    assert_close(run(program, inputs), want, 1e-6)


def test_quantized_embeddings_are_not_gathered() -> None:
    program = parse(EMBEDDING, grouped("e", 320, 64, bits=8))
    assert lower_dense_embedding(program) == 0
