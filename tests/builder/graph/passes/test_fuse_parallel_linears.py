from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_parallel_linears import fuse_parallel_linears
from slipstream.builder.graph.program import Program
from slipstream.builder.graph.verifier import verify
from slipstream.weights.tensor import LazyTensor

QKV = """g (float[T, 64] x, float[48, 64] q, float[16, 64] k, float[32, 64] v) => (float[T, 96] y) {
  a = slipstream.Linear <in_features = 64, out_features = 48> (x, q)
  b = slipstream.Linear <in_features = 64, out_features = 16> (x, k)
  c = slipstream.Linear <in_features = 64, out_features = 32> (x, v)
  y = Concat <axis = -1> (a, b, c)
}"""
BIASED = """g (float[T, 64] x, float[48, 64] aw, float[16, 64] bw, float[48] ab, float[16] bb)
  => (float[T, 64] y) {
  a = slipstream.Linear <in_features = 64, out_features = 48> (x, aw, ab)
  b = slipstream.Linear <in_features = 64, out_features = 16> (x, bw, bb)
  y = Concat <axis = -1> (a, b)
}"""
PARTS = (("q", 48), ("k", 16), ("v", 32))


def assert_untouched(program: Program) -> None:
    before = listing(program)
    assert fuse_parallel_linears(program) == 0
    assert listing(program) == before


@pytest.mark.parametrize("make", [dense, grouped])
def test_q_k_v_become_one_linear(make: Callable[[str, int, int], LazyTensor]) -> None:
    weights = [make("q", 48, 64), make("k", 16, 64), make("v", 32, 64)]
    program = parse(QKV, *weights)
    want = outputs(program)

    assert fuse_parallel_linears(program) == 1

    program.drop_unused_weights()
    verify(program, "fuse_parallel_linears")
    assert listing(program) == ["y = Linear(x, q+k+v) in_features=64 out_features=96"]
    stacked = program.weights["q+k+v"].load().dequantize()
    rows = np.concatenate([weight.load().dequantize() for weight in weights])
    np.testing.assert_array_equal(stacked, rows)
    assert list(program.weights) == ["q+k+v"]
    assert_close(outputs(program), want, 1e-6)


def test_biases_are_stacked_with_their_weights() -> None:
    weights = [dense("aw", 48, 64), dense("bw", 16, 64), dense("ab", 48), dense("bb", 16)]
    program = parse(BIASED, *weights)
    want = outputs(program)
    assert fuse_parallel_linears(program) == 1
    assert listing(program) == ["y = Linear(x, aw+bw, ab+bb) in_features=64 out_features=64"]
    assert_close(outputs(program), want, 1e-6)


@pytest.mark.parametrize(
    "v",
    [
        dense("v", 32, 64),
        grouped("v", 32, 64, bits=8),
        grouped("v", 32, 64, group=64),
        grouped("v", 32, 64, zero="midpoint"),
    ],
    ids=["dense", "bits", "group", "zero"],
)
def test_neighbours_of_one_format_are_fused_and_others_stay_apart(v: LazyTensor) -> None:
    q, k = grouped("q", 48, 64), grouped("k", 16, 64)
    program = parse(QKV, q, k, v)
    want = outputs(program)
    assert fuse_parallel_linears(program) == 1
    program.drop_unused_weights()
    verify(program, "fuse_parallel_linears")
    assert [node.op_type for node in program.graph] == ["Linear", "Linear", "Concat"]
    assert list(program.weights) == ["v", "q+k"]
    assert_close(outputs(program), want, 1e-6)


def test_no_two_of_one_format_stay_apart() -> None:
    assert_untouched(
        parse(QKV, dense("q", 48, 64), grouped("k", 16, 64), dense("v", 32, 64)),
    )
    assert_untouched(
        parse(QKV, grouped("q", 48, 64, bits=8), grouped("k", 16, 64), dense("v", 32, 64))
    )


def test_inputs_must_be_equal() -> None:
    text = QKV.replace("(float[T, 64] x,", "(float[T, 64] x, float[T, 64] z,")
    text = text.replace("(x, k)", "(z, k)")
    assert_untouched(parse(text, dense("q", 48, 64), dense("k", 16, 64), dense("v", 32, 64)))


def test_all_or_none_must_have_a_bias() -> None:
    text = BIASED.replace(", float[16] bb", "").replace(", bb)", ")")
    assert_untouched(parse(text, dense("aw", 48, 64), dense("bw", 16, 64), dense("ab", 48)))


def test_every_part_must_be_a_linear() -> None:
    text = QKV.replace("(a, b, c)", "(a, b, x)")
    assert_untouched(parse(text.replace("96", "128"), *(dense(n, s, 64) for n, s in PARTS)))


def test_a_part_that_is_used_elsewhere_stays() -> None:
    text = QKV.replace("=> (", "=> (float[T, 32] d, ").replace("}", "  d = Mul (c, c)\n}")
    assert_untouched(parse(text, *(dense(name, rows, 64) for name, rows in PARTS)))


def test_a_part_that_is_an_output_stays() -> None:
    text = QKV.replace("=> (", "=> (float[T, 32] c, ")
    assert_untouched(parse(text, *(dense(name, rows, 64) for name, rows in PARTS)))


def test_a_linear_that_does_more_stays() -> None:
    text = QKV.replace("float[T, 64] x,", "float[T, 64] x, float[64] n,", 1)
    for name in "qkv":
        text = text.replace(f"(x, {name})", f'(x, {name}, "", "", n)')
    assert_untouched(
        parse(text, dense("n", 64), *(grouped(name, rows, 64) for name, rows in PARTS))
    )
