from __future__ import annotations

import pytest
from tests.programs import assert_close, dense, listing, outputs, parse

from slipstream.builder.graph.passes.fuse_embedding_shard import fuse_embedding_shard
from slipstream.builder.graph.verifier import verify

# Of five tokens this rank has those from ``first`` on, at most three.
TEXT = """g (int32[T] ids, int32[1] first, float[3, 64] w) => (float[T, 64] y)
  <int32 low = {0}, int32 high = {2}, int64[1] axis = {1}> {
  own = Sub (ids, first)
  row = Clip (own, low, high)
  here = Equal (own, row)
  factor = Cast <to = 1> (here)
  column = Unsqueeze (factor, axis)
  rows = slipstream.Embedding <in_features = 64, out_features = 3> (row, w)
  y = Mul (rows, column)
}"""


def test_the_lookup_in_a_part_is_one_node() -> None:
    program = parse(TEXT, dense("w", 3, 64))
    want = outputs(program)
    assert fuse_embedding_shard(program) == 1
    verify(program, "fuse_embedding_shard")
    (line,) = listing(program)
    assert line == "y = EmbeddingShard(ids, w, first) in_features=64 out_features=3"
    assert_close(outputs(program), want, 1e-6)
    assert any((row == 0).all() for row in want["y"]), "some tokens are another rank's"


UNMATCHED = {
    "a table of all": TEXT.replace("(row, w)", "(ids, w)"),
    "rows times something else": TEXT.replace("Mul (rows, column)", "Mul (rows, rows)"),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_does_not_match(case: str) -> None:
    text = UNMATCHED[case]
    program = parse(text.replace("float[3, 64]", "float[5, 64]"), dense("w", 5, 64))
    before = listing(program)
    assert fuse_embedding_shard(program) == 0
    assert listing(program) == before
