from __future__ import annotations

import pytest
from tests.programs import apply, assert_close, dense, evaluate, feeds, listing, outputs, parse
from tests.programs import run_onnxruntime as run

from slipstream.builder.targets.cpu.dense import store_dense_weights
from slipstream.builder.targets.cpu.elementwise import (
    lower_add_rms_norm,
    lower_gated_activation,
    lower_rms_norm,
    lower_soft_cap,
)
from slipstream.plugins.gated_mlp import GATES


def test_rms_norm() -> None:
    program = parse(
        """g (float[T, 64] x, float[64] n) => (float[T, 64] y) {
          y = RMSNormalization <axis = -1, epsilon = 0.01> (x, n)
        }""",
        dense("n", 64, dtype="float16"),
    )
    inputs, want = feeds(program), outputs(program)
    assert apply(program, lower_rms_norm, store_dense_weights)[0] == 1
    node = "SimplifiedLayerNormalization(x, n.float32) axis=-1 epsilon=0.01 stash_type=1"
    assert listing(program) == [f"y = {node}"]
    assert_close(run(program, inputs), want, 1e-6)


def test_add_rms_norm_with_and_without_a_reader_of_the_sum() -> None:
    text = """g (float[T, 64] x, float[T, 64] r, float[64] n) => (float[T, 64] y, float[T, 64] z) {
      y, s = slipstream.FusedAddRMSNorm <norm_eps = 0.01> (x, r, n)
      z = Add (s, y)
    }"""
    for variant in (text, text.replace("(s, y)", "(r, y)")):
        program = parse(variant, dense("n", 64))
        inputs, want = feeds(program), outputs(program)
        assert apply(program, lower_add_rms_norm, store_dense_weights)[0] == 1
        skip = "SkipSimplifiedLayerNormalization(x, r, n.float32) epsilon=0.01"
        assert listing(program)[0] == f"y, , , s = {skip}"
        assert_close(run(program, inputs), want, 1e-6)


def test_two_gates_keep_their_values_apart() -> None:
    program = parse(
        """g (float[T, 64] a, float[T, 64] b) => (float[T, 32] y, float[T, 32] z) {
          y = slipstream.GatedActivation (a)
          z = slipstream.GatedActivation (b)
        }"""
    )
    inputs = feeds(program)
    inputs["a"] *= 20  # far out on both sides of the sigmoid
    want = evaluate(program, inputs)
    assert lower_gated_activation(program) == 2
    assert [node.op_type for node in program.graph] == ["Split", "QuickGelu", "Mul"] * 2
    assert_close(run(program, inputs), want, 1e-6)


@pytest.mark.parametrize("gate", GATES.values())
def test_every_gate(gate: int) -> None:
    program = parse(
        f"""g (float[T, 64] a) => (float[T, 32] y) {{
          y = slipstream.GatedActivation <gate = {gate}> (a)
        }}"""
    )
    inputs = feeds(program)
    inputs["a"] *= 20
    want = evaluate(program, inputs)
    assert lower_gated_activation(program) == 1
    assert_close(run(program, inputs), want, 1e-6)


def test_soft_caps_keep_their_values_apart() -> None:
    program = parse(
        """g (float[T, 64] a) => (float[T, 64] y, float[T, 64] z) {
          y = slipstream.SoftCap <cap = 0.5> (a)
          z = slipstream.SoftCap <cap = 20.0> (a)
        }"""
    )
    inputs, want = feeds(program), outputs(program)
    assert lower_soft_cap(program) == 2
    assert [node.op_type for node in program.graph] == ["Div", "Tanh", "Mul"] * 2
    assert_close(run(program, inputs), want, 1e-6)
