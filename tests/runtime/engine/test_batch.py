from __future__ import annotations

import random
from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream.builder.contract import KV, attention_cache
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.batch import BatchBuilder
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams

CACHES = (attention_cache("float32", [0], 4, 1, 8),)
CONFIG = RuntimeConfig(max_batch_size=4, max_num_tokens=16, max_seq_len=32, page_size=4)


def sequence(prompt: list[int], arrival: int, params: SamplingParams | None = None) -> Sequence:
    request = Request(str(arrival), prompt, params or SamplingParams())
    return Sequence(request, 0, (0, arrival, 0), max_tokens=8, seed=arrival)


def test_prefill_chunks_and_decodes_are_packed_without_padding() -> None:
    scheduler, builder = Scheduler(CONFIG, 16), BatchBuilder(CONFIG, CACHES)
    first, second = sequence([10, 11, 12], 1), sequence(list(range(20, 40)), 2)
    scheduler.add(first)
    plan = scheduler.schedule()
    builder.build(plan)
    scheduler.commit(plan, 0.0)
    first.append(13)
    scheduler.add(second)
    batch, owners, positions = builder.build(scheduler.schedule())

    paged = batch.pages[KV]
    page = first.allocation.pages[0] if first.allocation else -1
    pages = second.allocation.pages if second.allocation else []
    slots = [pages[position // 4] * 4 + position % 4 for position in range(15)]
    assert batch.token_ids.tolist() == [13, *range(20, 35)]
    assert batch.positions.tolist() == [3, *range(15)]
    assert batch.query_start.tolist() == [0, 1, 16]
    assert batch.context_len.tolist() == [4, 15]
    assert paged.slot_mapping.tolist() == [page * 4 + 3, *slots]
    assert paged.page_table[0, 0] == page and paged.page_table[1].tolist() == pages
    assert batch.logits_rows.tolist() == [0], "the second prompt is not complete yet"
    assert owners == [first] and positions == [1]
    assert batch.slots.tolist() == [first.row, second.row]
    assert batch.sampling_slots.tolist() == [first.row]
    assert batch.sampling[0].position == 1
    assert second.allocation and second.allocation.synced == len(pages), "not to be copied again"
    assert all(
        array.dtype == "int32" and array.flags.c_contiguous
        for array in (batch.token_ids, batch.positions, paged.page_table, paged.slot_mapping)
    )


def test_a_sampling_row_shows_the_live_tokens_of_its_sequence() -> None:
    scheduler, builder = Scheduler(CONFIG, 16), BatchBuilder(CONFIG, CACHES)
    scheduler.add(only := sequence([1, 2], 7))
    batch, *_ = builder.build(scheduler.schedule())

    row = batch.sampling[0]
    assert (row.params, row.prompt, row.seed) == (only.request.params, [1, 2], 7)
    assert row.output is only.output


def test_a_token_on_its_way_is_left_to_the_device() -> None:
    scheduler, builder = Scheduler(CONFIG, 16), BatchBuilder(CONFIG, CACHES)
    scheduler.add(only := sequence([1, 2], 7))
    batches = [builder.build(scheduler.schedule())[0]]
    row = batches[0].sampling[0]
    assert row.position == 0
    batches.append(builder.build(scheduler.schedule())[0])

    assert [batch.token_ids.tolist() for batch in batches] == [[1, 2], [-1]]
    assert [batch.positions.tolist() for batch in batches] == [[0, 1], [2]]
    assert [batch.context_len.tolist() for batch in batches] == [[2], [3]]
    assert batches[1].sampling == [row] and row.position == 1, "the row is made once"
    assert row.output is only.output and not only.output


def test_decodes_are_told_in_the_arrays_of_the_step_before() -> None:
    scheduler, builder = Scheduler(CONFIG, 16), BatchBuilder(CONFIG, CACHES)
    scheduler.add(only := sequence([1, 2], 7))
    told = []
    for token in range(3, 7):
        plan = scheduler.schedule()
        batch, *_ = builder.build(plan)
        changing = (batch.token_ids, batch.positions, batch.context_len)
        told.append((changing, [array.tolist() for array in changing]))
        scheduler.commit(plan, 0.0)
        only.append(token)

    arrays, numbers = zip(*told, strict=True)
    assert list(numbers) == [
        [[1, 2], [0, 1], [2]],
        [[3], [2], [3]],
        [[4], [3], [4]],
        [[5], [4], [5]],
    ]
    kept = zip(arrays[1], arrays[3], strict=True)
    assert all(before is after for before, after in kept), "they are written anew"


def test_a_scored_prompt_asks_for_each_row_once() -> None:
    scheduler, builder = Scheduler(CONFIG, 16), BatchBuilder(CONFIG, CACHES)
    scored = sequence(list(range(20)), 1, SamplingParams(prompt_logprobs=0))
    scored.prompt_logprobs = [None]
    scheduler.add(scored)
    targets: list[int | None] = []
    slots: list[int] = []
    for _ in range(2):
        plan = scheduler.schedule()
        batch, *_ = builder.build(plan)
        targets += [row.target for row in batch.sampling]
        slots += batch.sampling_slots.tolist()
        for row in batch.sampling:
            if row.target is not None:
                scored.prompt_logprobs.append(None)
        scheduler.commit(plan, 0.0)

    assert targets == [*range(1, 20), None]
    assert slots == [-1] * 19 + [scored.row]


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_kept_from_step_to_step_is_what_a_new_builder_makes(seed: int, window: int) -> None:
    """Sequences come, end and lose their pages at random, and share their beginnings."""
    caches = (*CACHES, replace(CACHES[0], name="near", window=window)) if window else CACHES
    scheduler, kept = Scheduler(CONFIG, 12, caches), BatchBuilder(CONFIG, caches)
    rng, arrived = random.Random(seed), 0
    seen: dict[str, NDArray[np.int32]] = {}
    again = 0
    for _ in range(120):
        if rng.random() < 0.15 and len(scheduler.waiting) < 3:
            arrived += 1
            scheduler.add(sequence([1] * rng.randrange(1, 20), arrived))
        if scheduler.running and rng.random() < 0.05:
            scheduler.finish(rng.choice(scheduler.running))
        plan = scheduler.schedule()
        if not plan.sequences:
            continue
        batch, owners, positions = kept.build(plan)
        for allocation in plan.allocations:
            allocation.synced = 0
            for near in allocation.windows:
                near.synced = 0
        new, new_owners, new_positions = BatchBuilder(CONFIG, caches).build(plan)
        assert told(plan, batch) == told(plan, new)
        assert (owners, positions) == (new_owners, new_positions)
        arrays = arrays_of(batch)
        again += sum(array is seen.get(name) for name, array in arrays.items())
        seen = arrays
        scheduler.commit(plan, 0.0)
        for owner in owners:
            owner.append(1)
            if owner.finish_reason:
                scheduler.finish(owner)
    assert again > 100, "or nothing is kept"
    with pytest.raises(ValueError, match="read-only"):
        seen["slots"][0] = 1


def arrays_of(batch: StepBatch) -> dict[str, NDArray[np.int32]]:
    """By name, those of caches too."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    for name, paged in batch.pages.items():
        arrays[f"{name} table"], arrays[f"{name} slots"] = paged.page_table, paged.slot_mapping
    return arrays


def told(plan: StepPlan, batch: StepBatch) -> dict[str, list[object]]:
    """What a step tells a device: of page tables, what sequences have."""
    lists = {name: array.tolist() for name, array in arrays_of(batch).items()}
    held = {f"{KV} table": [each.pages for each in plan.allocations]}
    if "near table" in lists:
        held["near table"] = [each.windows[0].pages for each in plan.allocations]
    for name, pages in held.items():
        lists[name] = [row[: len(own)] for row, own in zip(lists[name], pages, strict=True)]
    return lists
