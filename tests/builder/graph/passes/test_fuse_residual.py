from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_residual import fuse_residual
from slipstream.builder.graph.verifier import verify

TEXT = """g (float[T, 64] x, float[T, 48] r, float[48, 64] w) => (float[T, 48] y) {
  h = slipstream.Linear <in_features = 64, out_features = 48> (x, w)
  y = Add (r, h)
}"""
ATTRIBUTES = "in_features=64 out_features=48"


@pytest.mark.parametrize("order", ["(r, h)", "(h, r)"])
def test_the_add_joins_the_linear(order: str) -> None:
    program = parse(TEXT.replace("(r, h)", order), grouped("w", 48, 64))
    want = outputs(program)
    assert fuse_residual(program) == 1
    verify(program, "fuse_residual")
    assert listing(program) == [f"y = Linear(x, w, _, r) {ATTRIBUTES}"]
    assert_close(outputs(program), want)


def test_a_bias_is_kept() -> None:
    text = TEXT.replace("(x, w)", "(x, w, b)").replace(") =>", ", float[48] b) =>")
    program = parse(text, grouped("w", 48, 64), dense("b", 48))
    want = outputs(program)
    assert fuse_residual(program) == 1
    assert listing(program) == [f"y = Linear(x, w, b, r) {ATTRIBUTES}"]
    assert_close(outputs(program), want)


def test_the_fused_linear_stands_after_both_operands() -> None:
    """The residual may be made between the Linear and the Add."""
    program = parse(
        """g (float[T, 64] x, float[T, 48] s, float[48, 64] w) => (float[T, 48] y) {
          h = slipstream.Linear <in_features = 64, out_features = 48> (x, w)
          r = Mul (s, s)
          y = Add (h, r)
        }""",
        grouped("w", 48, 64),
    )
    want = outputs(program)
    assert fuse_residual(program) == 1
    verify(program, "fuse_residual")
    assert listing(program) == ["r = Mul(s, s)", f"y = Linear(x, w, _, r) {ATTRIBUTES}"]
    assert_close(outputs(program), want)


def test_a_chain_of_two_layers_fuses_twice() -> None:
    program = parse(
        """g (float[T, 64] x, float[64, 64] v, float[64, 64] w) => (float[T, 64] y) {
          h = slipstream.Linear <in_features = 64, out_features = 64> (x, v)
          m = Add (x, h)
          i = slipstream.Linear <in_features = 64, out_features = 64> (m, w)
          y = Add (m, i)
        }""",
        grouped("v", 64, 64),
        grouped("w", 64, 64),
    )
    want = outputs(program)
    assert fuse_residual(program) == 2
    verify(program, "fuse_residual")
    assert [line.split(" in_")[0] for line in listing(program)] == [
        "m = Linear(x, v, _, x)",
        "y = Linear(m, w, _, m)",
    ]
    assert_close(outputs(program), want)


def test_of_two_products_one_becomes_the_residual_of_the_other() -> None:
    program = parse(
        """g (float[T, 64] x, float[48, 64] v, float[48, 64] w) => (float[T, 48] y) {
          h = slipstream.Linear <in_features = 64, out_features = 48> (x, v)
          i = slipstream.Linear <in_features = 64, out_features = 48> (x, w)
          y = Add (h, i)
        }""",
        grouped("v", 48, 64),
        grouped("w", 48, 64),
    )
    want = outputs(program)
    assert fuse_residual(program) == 1
    verify(program, "fuse_residual")
    assert [line.split(" in_")[0] for line in listing(program)] == [
        "i = Linear(x, w)",
        "y = Linear(x, v, _, i)",
    ]
    assert_close(outputs(program), want)


UNMATCHED = {
    "a weight that our kernels cannot hold": (TEXT, grouped("w", 48, 64, group=16)),
    "a product that is an output": (
        TEXT.replace("=> (", "=> (float[T, 48] h, "),
        grouped("w", 48, 64),
    ),
    "a product that something else reads": (
        TEXT.replace("}", "  z = Mul (h, h)\n}").replace("=> (", "=> (float[T, 48] z, "),
        grouped("w", 48, 64),
    ),
    "a product added to itself": (TEXT.replace("(r, h)", "(h, h)"), grouped("w", 48, 64)),
    "a Linear that has a residual": (TEXT.replace("(x, w)", '(x, w, "", r)'), grouped("w", 48, 64)),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_does_not_match(case: str) -> None:
    text, weight = UNMATCHED[case]
    program = parse(text, weight)
    before = listing(program)
    assert fuse_residual(program) == 0
    assert listing(program) == before


EXPERTS = """g (float[T, 64] x, float[T, 64] r, int32[T, 2] e, float[T, 2] f, float[160, 64] v,
  float[320, 32] w) => (float[T, 64] y) {
  h = slipstream.ExpertLinear <in_features = 64, out_features = 32, experts = 5, top_k = 2>
    (x, v, e)
  s = slipstream.ExpertLinear <in_features = 32, out_features = 64, experts = 5, top_k = 2,
    reduce = 1> (h, w, e, f)
  y = Add (r, s)
}"""


@pytest.mark.parametrize("order", ["(r, s)", "(s, r)"])
def test_the_add_joins_the_sum_of_experts(order: str) -> None:
    """Whatever their weights are held in."""
    text = EXPERTS.replace("(r, s)", order)
    program = parse(text, grouped("v", 160, 64), dense("w", 320, 32))
    want = outputs(program)
    assert fuse_residual(program) == 1
    verify(program, "fuse_residual")
    assert [line.split(" experts")[0] for line in listing(program)] == [
        "h = ExpertLinear(x, v, e)",
        "y = ExpertLinear(h, w, e, f, _, r)",
    ]
    assert_close(outputs(program), want)


def test_of_experts_and_a_shared_one_one_takes_the_other() -> None:
    """A sum that has a residual takes no second one."""
    text = EXPERTS.replace("float[T, 64] r", "float[T, 64] q, float[T, 64] r").replace(
        "y = Add (r, s)", "t = Add (s, q)\n  y = Add (r, t)"
    )
    program = parse(text, grouped("v", 160, 64), dense("w", 320, 32))
    want = outputs(program)
    assert fuse_residual(program) == 1
    verify(program, "fuse_residual")
    assert [line.split(" experts")[0] for line in listing(program)][1:] == [
        "t = ExpertLinear(h, w, e, f, _, q)",
        "y = Add(r, t)",
    ]
    assert_close(outputs(program), want)


def test_products_that_are_not_added_up_take_no_residual() -> None:
    program = parse(
        """g (float[T, 64] x, int32[T, 2] e, float[160, 64] v) => (float[U, 32] y) {
          h = slipstream.ExpertLinear <in_features = 64, out_features = 32, experts = 5, top_k = 2>
            (x, v, e)
          r = Sigmoid (x)
          i = slipstream.ExpertLinear <in_features = 64, out_features = 32, experts = 5, top_k = 2>
            (r, v, e)
          y = Add (h, i)
        }""",
        grouped("v", 160, 64),
    )
    assert fuse_residual(program) == 0
