from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_all_reduce import fuse_all_reduce
from slipstream.builder.graph.verifier import verify

TEXT = """g (float[T, 64] r, float[T, 64] x, float[64] n) => (float[T, 64] z) {
  a = slipstream.AllReduce <ranks = 2> (x)
  s = Add (r, a)
  y = RMSNormalization <axis = -1, epsilon = 0.01> (s, n)
  z = Mul (s, y)
}"""
FUSED = "y, s = AllReduceAddRMSNorm(x, r, n) norm_eps=0.01 ranks=2"


@pytest.mark.parametrize("order", ["(r, a)", "(a, r)"])
def test_ranks_add_and_normalize_where_they_meet(order: str) -> None:
    program = parse(TEXT.replace("(r, a)", order), dense("n", 64))
    want = outputs(program)
    assert fuse_all_reduce(program) == 1
    verify(program, "fuse_all_reduce")
    assert listing(program) == [FUSED, "z = Mul(s, y)"]
    assert_close(outputs(program), want, 1e-6)


UNMATCHED = {
    "no ranks": TEXT.replace("slipstream.AllReduce <ranks = 2>", "Sigmoid"),
    "no norm": TEXT.replace("RMSNormalization <axis = -1, epsilon = 0.01> (s, n)", "Mul (s, n)"),
    "two norms": TEXT.replace("Mul (s, y)", "RMSNormalization <axis = -1> (s, n)"),
    "a norm of something else": TEXT.replace("> (s, n)", "> (x, n)"),
    "a norm before the sum": TEXT.replace("= Add (r, a)", "= Add (r, b)").replace(
        "  s =", "  b = RMSNormalization <axis = -1> (a, n)\n  s ="
    ),
    "another reader of what ranks add up": TEXT.replace("Mul (s, y)", "Mul (a, y)"),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_does_not_match(case: str) -> None:
    program = parse(UNMATCHED[case], dense("n", 64))
    before = listing(program)
    assert fuse_all_reduce(program) == 0
    assert listing(program) == before
