from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_add_rms_norm import fuse_add_rms_norm
from slipstream.builder.graph.verifier import verify

TEXT = """g (float[T, 64] r, float[T, 64] x, float[64] n) => (float[T, 64] y, float[T, 64] z) {
  s = Add (r, x)
  y = RMSNormalization <axis = -1, epsilon = 0.01> (s, n)
  z = Mul (s, y)
}"""


def test_the_sum_goes_on_beside_the_norm() -> None:
    program = parse(TEXT, dense("n", 64))
    want = outputs(program)
    assert fuse_add_rms_norm(program) == 1
    verify(program, "fuse_add_rms_norm")
    assert listing(program) == ["y, s = FusedAddRMSNorm(x, r, n) norm_eps=0.01", "z = Mul(s, y)"]
    assert_close(outputs(program), want, 1e-6)


def test_a_reader_between_add_and_norm_comes_after_the_fused_node() -> None:
    text = TEXT.replace("  y =", "  m = Mul (s, x)\n  y =").replace("(s, y)", "(m, y)")
    program = parse(text, dense("n", 64))
    want = outputs(program)
    assert fuse_add_rms_norm(program) == 1
    verify(program, "fuse_add_rms_norm")
    assert listing(program)[0].startswith("y, s = FusedAddRMSNorm")
    assert_close(outputs(program), want, 1e-6)


def test_the_sum_may_be_an_output() -> None:
    program = parse(TEXT.replace("=> (", "=> (float[T, 64] s, "), dense("n", 64))
    want = outputs(program)
    assert fuse_add_rms_norm(program) == 1
    assert [value.name for value in program.graph.outputs] == ["s", "y", "z"]
    assert_close(outputs(program), want, 1e-6)


UNMATCHED = {
    "no norm": TEXT.replace("RMSNormalization <axis = -1, epsilon = 0.01> (s, n)", "Mul (s, n)"),
    "two norms": TEXT.replace("Mul (s, y)", "RMSNormalization <axis = -1> (s, n)"),
    "a norm of something else": TEXT.replace("> (s, n)", "> (x, n)"),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_does_not_match(case: str) -> None:
    program = parse(UNMATCHED[case], dense("n", 64))
    before = listing(program)
    assert fuse_add_rms_norm(program) == 0
    assert listing(program) == before
