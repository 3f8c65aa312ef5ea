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
    for shape in buckets.all_mixed:
        size = shape.tokens
        worst = min(size, batch)  # sequences, each with a block that is not full
        counts = [size // worst] * worst
        assert sum(-(-count // query_block) for count in counts) <= shape.blocks
        largest = buckets.largest
        for name in ("tokens", "sequences", "blocks", "rows"):
            assert getattr(shape, name) <= getattr(largest, name)


def test_mixed_steps_are_captured_for_some_numbers_of_decodes() -> None:
    buckets = Buckets(200, 8192, 32)
    of: dict[int, list[int]] = {size: [] for size in buckets.mixed_tokens}
    for shape in buckets.all_mixed:
        of[shape.tokens].append(shape.decodes)
    assert of[64] == [0] and of[128] == [0, 64] and of[512] == of[2048] == [0, 64, 200]
    for other in (Buckets(200, 8192, 32, deterministic=True), Buckets(200, 8192, 32, drafts=9)):
        assert not any(shape.decodes for shape in other.all_mixed), "blocks, all of them"


@pytest.mark.parametrize("batch", [1, 3, 16, 40, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_has_room_for_the_drafts_of_any_sequences(batch: int, deterministic: bool) -> None:
    buckets = Buckets(batch, 512, 32, deterministic, drafts=min(7 * batch, 192))
    known = {(shape.tokens, shape.queries) for shape in buckets.verifications}
    for sequences in range(1, batch + 1):
        for longest in (2, 3, 5, 8):
            most = min(sequences * longest, sequences + buckets.drafts)
            for tokens in {sequences + longest - 1, most}:
                if tokens > most:
                    continue
                shape = buckets.verification(tokens, sequences, longest)
                assert shape.tokens >= tokens and shape.sequences >= sequences
                assert deterministic or shape.queries >= longest
                assert shape.blocks == (shape.tokens if deterministic else 0)
                assert shape.tokens < 4 * tokens, "mostly padding"
                for name in ("tokens", "sequences", "blocks", "rows"):
                    assert getattr(shape, name) <= getattr(buckets.largest, name)
                kernels = {tokens for tokens, _ in known} | set(buckets.batch_sizes)
                assert shape.tokens in kernels, "its products are compiled before"
                assert shape.sequences in buckets.batch_sizes, "and those of a head"


def test_what_serves_for_a_step_has_room_for_it() -> None:
    """Also where decodes that would be blocks count as rows more."""
    buckets = Buckets(512, 8192, 32)
    for tokens in buckets.mixed_tokens:
        for wanted in (buckets.mixed(tokens), buckets.mixed(tokens, decodes=tokens // 2)):
            served = [shape for shape in buckets.all_mixed if buckets.alike(wanted, shape)]
            assert wanted in served
            for dim, size in wanted.sizes.items():
                assert all(shape.sizes[dim] >= size for shape in served)


def test_without_drafts_there_are_no_steps_for_them() -> None:
    buckets = Buckets(16, 512, 32)
    assert buckets.verifications == [] and buckets.row_sizes == buckets.batch_sizes
