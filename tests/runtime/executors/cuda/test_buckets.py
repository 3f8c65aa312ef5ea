"""The sizes that steps are padded to."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.runtime.executors.cuda.buckets import Buckets, bucket, decode_buckets


@pytest.mark.parametrize("limit", [1, 3, 16, 64, 200, 256, 300, 1000])
def test_batches_reach_the_limit_in_small_steps(limit: int) -> None:
    sizes = decode_buckets(limit)
    assert sizes == sorted(set(sizes)) and sizes[-1] == limit
    assert all(step <= 64 for step in np.diff([size for size in sizes if size >= 16]))
    for count in range(1, limit + 1):
        assert bucket(count, sizes) >= count


@pytest.mark.parametrize("query_block", [1, 32, 128])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (4, 96), (256, 8192)])
def test_a_mixed_step_has_room_for_any_sequences(batch: int, tokens: int, query_block: int) -> None:
    buckets = Buckets(batch, tokens, query_block)
    for size in buckets.mixed_tokens:
        shape = buckets.mixed(size)
        worst = min(size, batch)  # sequences, each with a block that is not full
        counts = [size // worst] * worst
        assert sum(-(-count // query_block) for count in counts) <= shape.blocks
        largest = buckets.largest
        for name in ("tokens", "sequences", "blocks", "rows"):
            assert getattr(shape, name) <= getattr(largest, name)
