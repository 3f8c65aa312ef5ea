from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_norm import fuse_norm
from slipstream.builder.graph.verifier import verify

TEXT = """g (float[T, 64] x, float[64] n, float[48, 64] a, float[64, 64] b)
  => (float[T, 48] y, float[T, 64] z) {
  h = RMSNormalization <axis = -1, epsilon = 0.01> (x, n)
  y = slipstream.Linear <in_features = 64, out_features = 48> (h, a)
  z = slipstream.Linear <in_features = 64, out_features = 64> (h, b)
}"""
WEIGHTS = (dense("n", 64), grouped("a", 48, 64), grouped("b", 64, 64, bits=8))
FUSED = [
    "y = Linear(x, a, _, _, n) in_features=64 norm_eps=0.01 out_features=48",
    "z = Linear(x, b, _, _, n) in_features=64 norm_eps=0.01 out_features=64",
]


def test_every_consumer_repeats_the_norm() -> None:
    program = parse(TEXT, *WEIGHTS)
    want = outputs(program)
    assert fuse_norm(program) == 1
    verify(program, "fuse_norm")
    assert listing(program) == FUSED
    # A value on the border between two int8 codes may round the other way.
    assert_close(outputs(program), want, 2e-3)


def test_bias_and_residual_keep_their_places() -> None:
    text = TEXT.replace("(h, a)", "(h, a, c, r)").replace("(h, b)", '(h, b, "", x)')
    text = text.replace("64] b)", "64] b, float[48] c, float[T, 48] r)")
    program = parse(text, *WEIGHTS, dense("c", 48))
    want = outputs(program)
    assert fuse_norm(program) == 1
    verify(program, "fuse_norm")
    assert [line.split(" in_")[0] for line in listing(program)] == [
        "y = Linear(x, a, c, r, n)",
        "z = Linear(x, b, _, x, n)",
    ]
    assert_close(outputs(program), want, 2e-3)


def test_a_gated_linear_stays_gated() -> None:
    text = TEXT.replace("(h, a)", "(h, a)").replace("<in_features", "<gated = 1, in_features", 1)
    program = parse(text.replace("float[T, 48] y", "float[T, 24] y"), *WEIGHTS)
    want = outputs(program)
    assert fuse_norm(program) == 1
    assert listing(program)[0] == (
        "y = Linear(x, a, _, _, n) gated=1 in_features=64 norm_eps=0.01 out_features=48"
    )
    assert_close(outputs(program), want, 2e-3)


UNMATCHED = {
    "one consumer that our kernels cannot hold": (
        TEXT,
        (*WEIGHTS[:2], grouped("b", 64, 64, group=16)),
    ),
    "a consumer that is no Linear": (
        TEXT.replace("}", "  s = Mul (h, h)\n}").replace("=> (", "=> (float[T, 64] s, "),
        WEIGHTS,
    ),
    "a norm that is an output": (TEXT.replace("=> (", "=> (float[T, 64] h, "), WEIGHTS),
    "a norm that is the residual of a Linear": (TEXT.replace("(h, b)", '(x, b, "", h)'), WEIGHTS),
    "a norm that is input and residual": (TEXT.replace("(h, b)", '(h, b, "", h)'), WEIGHTS),
    "a Linear that has a norm": (TEXT.replace("(h, b)", '(h, b, "", "", n)'), WEIGHTS),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_does_not_match(case: str) -> None:
    text, weights = UNMATCHED[case]
    program = parse(text, *weights)
    before = listing(program)
    assert fuse_norm(program) == 0
    assert listing(program) == before
