from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_router import fuse_router
from slipstream.builder.graph.verifier import verify

TEXT = """g (float[T, 64] x, float[64] n, float[8, 64] a, float[8] b, float[8] c)
  => (float[T, 64] s, int32[T, 2] e, float[T, 2] w) {
  h = RMSNormalization <axis = -1, epsilon = 0.01> (x, n)
  s = Mul (h, h)
  l = slipstream.Linear <in_features = 64, out_features = 8> (h, a, b)
  e, w = slipstream.Router <top_k = 2, scoring = 1, scale = 2.5> (l, c)
}"""
WEIGHTS = (dense("n", 64), dense("a", 8, 64), dense("b", 8), dense("c", 8))


def test_norm_product_and_choice_are_one_and_others_read_its_norm() -> None:
    program = parse(TEXT, *WEIGHTS)
    want = outputs(program)
    assert fuse_router(program) == 1
    verify(program, "fuse_router")
    fused, other = listing(program)
    assert "NormedRouter(x, a, n, b, c)" in fused and other.startswith("s = Mul(")
    assert_close(outputs(program), want)


UNMATCHED = {
    "a router that is quantized": (TEXT, (WEIGHTS[0], grouped("a", 8, 64), *WEIGHTS[2:])),
    "no norm": (TEXT.replace("(h, a, b)", "(x, a, b)"), WEIGHTS),
    "logits that others read": (
        TEXT.replace("=> (", "=> (float[T, 8] l, "),
        WEIGHTS,
    ),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_what_is_something_else_stays(case: str) -> None:
    text, weights = UNMATCHED[case]
    program = parse(text, *weights)
    before = listing(program)
    assert fuse_router(program) == 0
    assert listing(program) == before
