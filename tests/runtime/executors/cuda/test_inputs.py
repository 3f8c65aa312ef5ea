"""The block of a step's arrays, and how sequences are cut into blocks of queries."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.builder.contract import KV, Source, attention_cache, ports_of
from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.inputs import Layout, Shape, StepInputs, query_blocks
from slipstream.runtime.sampling.params import SamplingParams

LAYOUT = Layout(ports_of([attention_cache("float16", [0], 16, 1, 8)]), columns=4, query_block=16)


def batch(counts: list[int], contexts: list[int], columns: int = 3) -> StepBatch:
    """A step of sequences that compute ``counts`` tokens at the end of ``contexts``."""
    rng = np.random.default_rng(0)
    tokens = sum(counts)
    return StepBatch(
        token_ids=rng.integers(0, 99, tokens).astype(np.int32),
        positions=np.concatenate(
            [np.arange(c - n, c) for n, c in zip(counts, contexts, strict=True)]
        ).astype(np.int32),
        query_start=np.cumsum([0, *counts]).astype(np.int32),
        context_len=np.array(contexts, np.int32),
        logits_rows=(np.cumsum(counts) - 1).astype(np.int32),
        sampling=[SamplingRow(SamplingParams(), [0], [], 0)] * len(counts),
        slots=np.arange(len(counts), dtype=np.int32)[::-1].copy(),
        sampling_slots=np.arange(len(counts), dtype=np.int32)[::-1].copy(),
        pages={
            KV: PagedInputs(
                rng.integers(1, 99, (len(counts), columns)).astype(np.int32),
                rng.integers(0, 999, tokens).astype(np.int32),
            )
        },
    )


@pytest.mark.parametrize("first", [0, 2])
def test_blocks_cover_every_query_once_and_longest_contexts_come_first(first: int) -> None:
    step = batch([1, 1, 40, 7, 16], [9, 100, 40, 300, 16])
    blocks = query_blocks(step, first, 16)
    covered = sorted(
        (int(s), int(q))
        for s, start in zip(blocks.sequence, blocks.start, strict=True)
        for q in range(start, min(start + 16, int(np.diff(step.query_start)[s])))
    )
    counts = np.diff(step.query_start)
    assert covered == [(s, q) for s in range(first, 5) for q in range(counts[s])]
    before = step.context_len - counts
    seen = [int(before[s] + q) for s, q in zip(blocks.sequence, blocks.start, strict=True)]
    assert seen == sorted(seen, reverse=True)


def test_a_step_arrives_padded() -> None:
    device = Device()
    inputs = StepInputs(device, LAYOUT, Shape(64, 8, 16, 8))
    junk = batch([30, 30], [60, 90], 4)
    inputs.load(junk, Shape(60, 2, 8, 2), query_blocks(junk, 0, 16), junk.logits_rows)
    step = batch([1, 5], [8, 20])
    shape = Shape(16, 4, 6, 4)
    blocks = query_blocks(step, 0, 16)
    with device.work():
        inputs.load(step, shape, blocks, step.logits_rows)
        views = inputs.step(shape, 0, pdl=False)
    device.synchronize()
    attention = views.attention["page_table"]
    assert views.inputs[Source.TOKEN_IDS].tolist() == [*step.token_ids, *[0] * 10]
    assert views.inputs[Source.POSITIONS].tolist()[:6] == step.positions.tolist()
    assert views.token_slots.tolist() == [1, 0, 0, 0, 0, 0, *[0] * 10]
    assert attention.slot_mapping.tolist() == [*step.pages[KV].slot_mapping, *[-1] * 10]
    assert attention.query_start.tolist()[:3] == [0, 1, 6]
    assert attention.context_len.tolist() == [8, 20, 0, 0]
    assert attention.block_sequence.tolist() == [*blocks.sequence, *[-1] * 4]
    assert attention.block_start.tolist()[:2] == blocks.start.tolist()
    assert attention.page_table[:2, :3].tolist() == step.pages[KV].page_table.tolist()
    assert inputs.logits_rows(shape).tolist() == [0, 5, 0, 0]


def test_caches_have_page_tables_and_slots_of_their_own() -> None:
    device = Device()
    windowed = attention_cache("float16", [1], 16, 1, 24, name="near", window=9)
    caches = [attention_cache("float16", [0], 16, 1, 8), windowed]
    shape = Shape(16, 4, 6, 4)
    layout = Layout(ports_of(caches), columns=4, query_block=16)
    inputs = StepInputs(device, layout, shape)
    step = batch([1, 5], [8, 20])
    step.pages["near"] = batch([1, 5], [8, 20], columns=2).pages[KV]
    with device.work():
        inputs.load(step, shape, query_blocks(step, 0, 16), step.logits_rows)
        views = inputs.step(shape, 0, pdl=False)
    device.synchronize()
    for name, suffix in ((KV, ""), ("near", ".near")):
        attention, pages = views.attention[f"page_table{suffix}"], step.pages[name]
        width = pages.page_table.shape[1]
        assert attention.page_table[:2, :width].tolist() == pages.page_table.tolist()
        assert attention.slot_mapping.tolist() == [*pages.slot_mapping, *[-1] * 10]


def test_every_array_starts_a_cache_line() -> None:
    shape = Shape(33, 5, 7, 3)
    places = LAYOUT.places(shape)
    starts = [start for start, _ in (*places.spans.values(), *places.tables.values())]
    assert all(start % 32 == 0 for start in starts)
    assert len(set(starts)) == len(starts)
