from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from tests.programs import apply, assert_close, dense, feeds, grouped, listing, outputs, parse
from tests.programs import run_onnxruntime as run

from slipstream.builder.graph.passes import matrices
from slipstream.builder.graph.passes.apply_input_transforms import ApplyInputTransforms
from slipstream.builder.targets.cpu.packed import pack_linear
from slipstream.plugins.operators import OPERATORS
from slipstream.plugins.spec import OperatorSpec
from slipstream.weights.tensor import InputTransform, LazyTensor, QuantTensor

K = 64
ORDER = np.random.default_rng(0).permutation(K).astype(np.int32)
SCALE = np.random.default_rng(1).uniform(0.5, 2, K).astype(np.float32)
THREE = """g (float[T, 64] x, float[48, 64] q, float[16, 64] k, float[32, 64] v)
  => (float[T, 48] a, float[T, 16] b, float[T, 32] c) {
  a = slipstream.Linear <in_features = 64, out_features = 48> (x, q)
  b = slipstream.Linear <in_features = 64, out_features = 16> (x, k)
  c = slipstream.Linear <in_features = 64, out_features = 32> (x, v)
}"""
NORMED = """g (float[T, 64] x, float[64] n, float[48, 64] q, float[16, 64] k)
  => (float[T, 48] a, float[T, 16] b) {
  y = RMSNormalization <axis = -1, epsilon = 0.01> (x, n)
  a = slipstream.Linear <in_features = 64, out_features = 48> (y, q)
  b = slipstream.Linear <in_features = 64, out_features = 16> (y, k)
}"""


def wanting(tensor: LazyTensor, perm: object = None, scale: object = None) -> LazyTensor:
    transform = InputTransform(perm, scale)  # type: ignore[arg-type]

    def load() -> QuantTensor:
        return replace(tensor.load(), input=transform)

    return LazyTensor(tensor.name, tensor.format, load, transform)


def exact(name: str, rows: int) -> LazyTensor:
    """Dense, so that the reference does not round x."""
    return dense(name, rows, K)


def test_equal_transforms_share_their_nodes() -> None:
    q, k = (
        wanting(exact(name, rows), ORDER.copy(), SCALE.copy())
        for name, rows in (("q", 48), ("k", 16))
    )
    program = parse(THREE, q, k, wanting(exact("v", 32), None, SCALE))
    want = outputs(program)
    assert apply(program, ApplyInputTransforms()) == [3]
    assert [line.split(" ")[2] for line in listing(program)] == [
        *("Mul(x,", "Gather(Linear_0/scale,"),
        *("Linear(Linear_0/perm,", "Linear(Linear_0/perm,", "Linear(Linear_0/scale,"),
    ]
    assert all(tensor.input is None for tensor in program.weights.values())
    assert all(tensor.load().input is None for tensor in program.weights.values())
    assert_close(outputs(program), want, 1e-6)


def test_unequal_transforms_have_their_own() -> None:
    q, k = wanting(exact("q", 48), ORDER), wanting(exact("k", 16), ORDER[::-1].copy())
    program = parse(THREE, q, k, exact("v", 32))
    want = outputs(program)
    assert apply(program, ApplyInputTransforms()) == [2]
    assert [node.op_type for node in program.graph] == [
        "Gather",
        "Linear",
        "Gather",
        *["Linear"] * 2,
    ]
    assert_close(outputs(program), want, 1e-6)


def test_what_changes_nothing_makes_no_node() -> None:
    ones = wanting(exact("q", 48), np.arange(K, dtype=np.int32), np.ones(K, np.float32))
    program = parse(THREE, ones, exact("k", 16), exact("v", 32))
    want = outputs(program)
    assert apply(program, ApplyInputTransforms()) == [1]
    assert [node.op_type for node in program.graph] == ["Linear"] * 3
    assert_close(outputs(program), want, 1e-6)


def test_onnxruntime_runs_what_is_made() -> None:
    q, k, v = (
        wanting(grouped(name, rows, K), ORDER, SCALE)
        for name, rows in (("q", 48), ("k", 16), ("v", 32))
    )
    program = parse(THREE, q, k, v)
    apply(program, ApplyInputTransforms())
    inputs, want = feeds(program), outputs(program)
    apply(program, pack_linear)
    assert_close(run(program, inputs), want)


@pytest.mark.parametrize("perm", [None, ORDER])
def test_a_scale_of_all_readers_goes_into_their_norm(perm: object) -> None:
    weights = [wanting(exact(name, rows), perm, SCALE) for name, rows in (("q", 48), ("k", 16))]
    program = parse(NORMED, dense("n", K), *weights)
    want = outputs(program)
    apply(program, ApplyInputTransforms(fold_norms=True))
    gather = [] if perm is None else ["Gather"]
    assert [node.op_type for node in program.graph] == [
        "RMSNormalization", *gather, "Linear", "Linear",
    ]  # fmt: skip
    assert_close(outputs(program), want, 1e-6)


def test_a_scale_of_some_readers_stays_out_of_the_norm() -> None:
    program = parse(NORMED, dense("n", K), wanting(exact("q", 48), None, SCALE), exact("k", 16))
    want = outputs(program)
    apply(program, ApplyInputTransforms(fold_norms=True))
    assert [node.op_type for node in program.graph] == [
        "RMSNormalization", "Mul", "Linear", "Linear",
    ]  # fmt: skip
    assert_close(outputs(program), want, 1e-6)


def test_an_embedding_is_not_permuted(caplog: pytest.LogCaptureFixture) -> None:
    tied = wanting(grouped("e", 320, K, bits=8), ORDER, SCALE)
    program = parse(
        """g (int32[T] ids, float[320, 64] e) => (float[T, 64] x, float[T, 320] y) {
          x = slipstream.Embedding <in_features = 64, out_features = 320> (ids, e)
          y = slipstream.Linear <in_features = 64, out_features = 320> (x, e)
        }""",
        tied,
    )
    rows = tied.load().dequantize()
    ids = feeds(program)["ids"]
    with caplog.at_level(logging.WARNING):
        apply(program, ApplyInputTransforms())
    assert program.weights["e"].format.kind == "dense"
    got = outputs(program)
    np.testing.assert_array_equal(got["x"], rows[ids])
    np.testing.assert_allclose(got["y"], rows[ids] @ rows.T, rtol=1e-4, atol=1e-4)
    assert caplog.messages == ["1 weights (e) are looked up too: they become dense"]


def far(*, weight: bool) -> OperatorSpec:
    """Linear under another package's name, whose weight is marked or not."""
    x, w, *rest = OPERATORS["Linear"].inputs
    inputs = (x, w if weight else replace(w, weight=None), *rest)
    return replace(OPERATORS["Linear"], name="Far", domain="far", inputs=inputs)


@pytest.mark.parametrize("marked", [True, False])
def test_products_of_other_packages_read_the_same_numbers(
    marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = parse(THREE, wanting(exact("q", 48), ORDER, SCALE), exact("k", 16), exact("v", 32))
    want, node = outputs(program), program.graph[0]
    monkeypatch.setattr(matrices, "OPERATORS", {**OPERATORS, "Far": far(weight=marked)})
    node.domain, node.op_type = "far", "Far"
    assert ApplyInputTransforms()(program) == 1
    node.domain, node.op_type = "slipstream", "Linear"
    made = ["Mul", "Gather"] if marked else []
    assert [n.op_type for n in program.graph] == [*made, *["Linear"] * 3]
    assert_close(outputs(program), want, 1e-6)
