from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_gate import fuse_gate
from slipstream.builder.graph.verifier import verify
from slipstream.weights.tensor import LazyTensor

TEXT = """g (float[T, 64] x, float[96, 64] w) => (float[T, 48] y) {
  h = slipstream.Linear <in_features = 64, out_features = 96> (x, w)
  y = slipstream.GatedActivation (h)
}"""
BIASED = TEXT.replace("(x, w)", "(x, w, b)").replace(") =>", ", float[96] b) =>")


def test_the_gate_joins_the_linear() -> None:
    program = parse(TEXT, grouped("w", 96, 64))
    want = outputs(program)
    assert fuse_gate(program) == 1
    verify(program, "fuse_gate")
    assert listing(program) == ["y = Linear(x, w) gated=1 in_features=64 out_features=96"]
    assert_close(outputs(program), want)


def test_a_bias_stays_before_the_gate() -> None:
    program = parse(BIASED, grouped("w", 96, 64), dense("b", 96))
    want = outputs(program)
    assert fuse_gate(program) == 1
    verify(program, "fuse_gate")
    assert listing(program) == ["y = Linear(x, w, b) gated=1 in_features=64 out_features=96"]
    assert_close(outputs(program), want)


RESIDUAL = TEXT.replace("(x, w)", '(x, w, "", r)').replace("x,", "x, float[T, 96] r,", 1)
GATED = TEXT.replace("<in", "<gated = 1, in").replace("48] y", "24] y")
UNMATCHED = {
    "a weight that our kernels cannot hold": (TEXT, grouped("w", 96, 64, group=16)),
    "a product that something else reads": (
        TEXT.replace("}", "  z = Add (h, h)\n}").replace("=> (", "=> (float[T, 96] z, "),
        grouped("w", 96, 64),
    ),
    "a product that is an output": (
        TEXT.replace("=> (", "=> (float[T, 96] h, "),
        grouped("w", 96, 64),
    ),
    "a residual, which would be added after the gate": (RESIDUAL, grouped("w", 96, 64)),
    "a gate of a gate": (GATED, grouped("w", 96, 64)),
    "a gate of no Linear": (
        TEXT.replace("slipstream.Linear <in_features = 64, out_features = 96> (x, w)", "Add (x, x)")
        .replace(", float[96, 64] w", "")
        .replace("48] y", "32] y"),
        None,
    ),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_does_not_match(case: str) -> None:
    text, weight = UNMATCHED[case]
    weights: list[LazyTensor] = [] if weight is None else [weight]
    program = parse(text, *weights)
    before = listing(program)
    assert fuse_gate(program) == 0
    assert listing(program) == before
