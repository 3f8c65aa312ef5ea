"""A scheduler and its steps, with every invariant checked on the way."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

from slipstream.builder.contract import CacheSpec
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence, Status
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput

PAGE = 4
_arrivals = itertools.count()


def sequence(
    prompt: list[int],
    max_tokens: int = 4,
    priority: int = 0,
    stop_after: int | None = None,
    jumps: bool = False,
) -> Sequence:
    """``jumps``: its form forces up to three tokens after one that is sampled."""
    arrival = next(_arrivals)
    params = SamplingParams(max_tokens=max_tokens)
    if stop_after is not None:  # the model says 0 for ever
        params = replace(params, min_tokens=min(stop_after, max_tokens), stop_token_ids=[0])
    if jumps:
        params = replace(params, structured=StructuredOutput(regex="0*"))
    request = Request(str(arrival), prompt, params)
    return Sequence(request, 0, (priority, arrival, 0), max_tokens, seed=0, jumps=jumps)


def scheduler(
    num_pages: int = 32,
    caches: tuple[CacheSpec, ...] = (),
    draft_tokens: int = 0,
    max_scored: int = sys.maxsize,
    **options: Any,  # noqa: ANN401
) -> Scheduler:
    limits = {"page_size": PAGE, "max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 64}
    config = RuntimeConfig().override({**limits, **options})
    return Scheduler(config, num_pages, caches, draft_tokens, max_scored)


def check(scheduler: Scheduler) -> None:
    allocations = [s.allocation for s in scheduler.running if s.allocation is not None]
    assert len(allocations) == len(scheduler.running)
    scheduler.kv.check_invariants(allocations)


def start(scheduler: Scheduler) -> StepPlan:
    """Plan a step and check the plan."""
    plan = scheduler.schedule()
    check(scheduler)
    assert len(set(plan.sequences)) == len(plan.sequences) <= 4
    assert sum(plan.counts) <= 16 and all(count > 0 for count in plan.counts)
    for each, begin, count, drafts in zip(
        plan.sequences, plan.starts, plan.counts, plan.drafts, strict=True
    ):
        assert each.allocation is not None
        assert begin + count - drafts == each.num_scheduled
        # A step before this one may still turn out to give a longer run.
        end = each.num_scheduled + each.num_drafted
        assert end <= len(each.allocation.pages) * PAGE and end <= each.max_cached_tokens
    assert len({each.row for each in scheduler.running}) == len(scheduler.running)
    return plan


def land(scheduler: Scheduler, plan: StepPlan) -> None:
    """End a step of a model that says 0 for ever."""
    guessed = scheduler._draft_tokens > 0
    scheduler.commit(plan, 0.0)
    check(scheduler)
    for each, output, drafts in zip(plan.sequences, plan.outputs, plan.drafts, strict=True):
        known = each.jumps and output < len(each.output)  # it was forced meanwhile
        if output >= 0 and each.status is not Status.FINISHED and not known:
            assert output == len(each.output) or (guessed and output < len(each.output))
            run = [0] * (1 + (each.order[1] + len(each.output)) % (drafts + 1))
            scheduler.accept(each, run)
            for token in run:
                if not each.finish_reason:
                    each.append(token)
            _force(each)
            if each.finish_reason:
                scheduler.finish(each)
            else:
                assert each.pending <= 1
    check(scheduler)


def _force(sequence: Sequence) -> None:
    count = (sequence.order[1] + len(sequence.output)) % 4 if sequence.jumps else 0
    for _ in range(count):
        if not sequence.finish_reason:
            sequence.force(0)


def step(scheduler: Scheduler) -> StepPlan:
    """One step, with every invariant checked on the way."""
    plan = start(scheduler)
    land(scheduler, plan)
    return plan


def drain(scheduler: Scheduler, limit: int = 500) -> None:
    for _ in range(limit):
        if not scheduler.has_work:
            break
        assert step(scheduler).sequences, "a step without progress"
    assert not scheduler.has_work
    assert scheduler.kv.num_available == scheduler.kv.num_pages


def planned(plan: StepPlan) -> list[tuple[Sequence, int]]:
    return list(zip(plan.sequences, plan.counts, strict=True))
