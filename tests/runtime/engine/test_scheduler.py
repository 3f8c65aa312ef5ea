from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from slipstream.builder.contract import CacheSpec
from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.scheduler import Scheduler, StepPlan
from slipstream.runtime.engine.sequence import Sequence, Status
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams

PAGE = 4
_arrivals = itertools.count()


def sequence(
    prompt: list[int], max_tokens: int = 4, priority: int = 0, stop_after: int | None = None
) -> Sequence:
    arrival = next(_arrivals)
    params = SamplingParams(max_tokens=max_tokens)
    if stop_after is not None:  # the model says 0 for ever
        params = replace(params, min_tokens=min(stop_after, max_tokens), stop_token_ids=[0])
    request = Request(str(arrival), prompt, params)
    return Sequence(request, 0, (priority, arrival, 0), max_tokens, seed=0)


def scheduler(
    num_pages: int = 32,
    caches: tuple[CacheSpec, ...] = (),
    draft_tokens: int = 0,
    **options: Any,  # noqa: ANN401
) -> Scheduler:
    limits = {"page_size": PAGE, "max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 64}
    config = RuntimeConfig().override({**limits, **options})
    return Scheduler(config, num_pages, caches, draft_tokens)


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
    scheduler.commit(plan)
    check(scheduler)
    for each, output, drafts in zip(plan.sequences, plan.outputs, plan.drafts, strict=True):
        if output >= 0 and each.status is not Status.FINISHED:
            assert output == len(each.output) or (guessed and output < len(each.output))
            run = [0] * (1 + (each.order[1] + len(each.output)) % (drafts + 1))
            scheduler.accept(each, run)
            for token in run:
                if not each.finish_reason:
                    each.append(token)
            if each.finish_reason:
                scheduler.finish(each)
            else:
                assert each.pending <= 1
    check(scheduler)


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


def test_scheduling_needs_no_tensor_library() -> None:
    code = (
        "import sys, slipstream.runtime.engine.scheduler as s; assert 'numpy' not in sys.modules, s"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decodes_come_first_and_prefill_chunks_fill_the_budget() -> None:
    engine = scheduler()
    short, long = sequence([1, 2, 3]), sequence(list(range(40)))
    engine.add(short)
    step(engine)
    engine.add(long)

    assert planned(step(engine)) == [(short, 1), (long, 15)]
    assert planned(step(engine)) == [(short, 1), (long, 15)]
    assert planned(step(engine)) == [(short, 1), (long, 10)]
    assert planned(step(engine)) == [(long, 1)], "the short one had its four tokens"


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    engine = scheduler(enable_chunked_prefill=False, max_seq_len=16)
    first, second = sequence([1] * 10), sequence([2] * 10)
    engine.add(first)
    engine.add(second)

    assert planned(step(engine)) == [(first, 10)]
    assert planned(step(engine)) == [(first, 1), (second, 10)]


def test_lower_priority_values_run_first_and_equal_ones_in_order_of_arrival() -> None:
    engine = scheduler(max_batch_size=1)
    order = [sequence([1], 1, priority) for priority in (5, 0, 5, -1)]
    for each in order:
        engine.add(each)

    ran = [step(engine).sequences[0] for _ in order]
    assert ran == [order[3], order[1], order[0], order[2]]


def test_when_pages_run_out_the_last_in_order_is_preempted_and_resumes() -> None:
    engine = scheduler(num_pages=4)
    late_but_urgent = sequence([1] * 6, max_tokens=10, priority=-1)
    early = sequence([2] * 6, max_tokens=10)
    engine.add(early)
    step(engine)
    engine.add(late_but_urgent)
    while not engine.stats.num_preemptions:
        step(engine)

    assert early.status is Status.WAITING and len(early.output) > 0
    assert late_but_urgent.status is Status.RUNNING
    drain(engine)
    assert len(early.output) == len(late_but_urgent.output) == 10


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = scheduler(num_pages=5)
    first, second = sequence([1] * 7, max_tokens=8), sequence([2] * 7, max_tokens=8)
    engine.add(first)
    engine.add(second)
    while second.status is not Status.WAITING or not engine.stats.num_preemptions:
        step(engine)
    while second.status is Status.WAITING:
        plan = step(engine)

    assert second in plan.admitted
    assert plan.counts[plan.sequences.index(second)] < len(second.tokens) - 1
    assert second.num_cached == 0, "what was cached for itself is not a prefix hit"


def test_guaranteed_no_evict_admits_only_what_can_run_to_its_end() -> None:
    engine = scheduler(num_pages=5, scheduler_policy="guaranteed_no_evict")
    first, second = sequence([1] * 4, max_tokens=9), sequence([2] * 4, max_tokens=9)  # 3 pages each
    engine.add(first)
    engine.add(second)

    step(engine)
    assert (engine.running, engine.waiting) == ([first], [second])
    drain(engine)
    assert engine.stats.num_preemptions == 0


def test_guaranteed_no_evict_counts_evictable_prefix_pages_as_free() -> None:
    engine = scheduler(num_pages=4, scheduler_policy="guaranteed_no_evict")
    engine.add(sequence([1] * 12, max_tokens=1))
    drain(engine)
    engine.add(same := sequence([1] * 13, max_tokens=4))
    step(engine)
    assert same.num_cached == 12
    drain(engine)
    engine.add(other := sequence([2] * 13, max_tokens=4))
    step(engine)
    assert other.status is Status.RUNNING and other.num_cached == 0


def test_prefix_hits_are_counted_in_tokens() -> None:
    engine = scheduler()
    engine.add(sequence([1] * 10))
    step(engine)
    engine.add(sequence([1] * 10))
    step(engine)

    assert (engine.stats.prefix_cache_queries, engine.stats.prefix_cache_hits) == (20, 8)
    drain(engine)


def test_scoring_a_prompt_computes_all_of_it() -> None:
    engine = scheduler()
    engine.add(sequence([1] * 10))
    drain(engine)
    scored = sequence([1] * 10)
    scored.prompt_logprobs = [None]
    engine.add(scored)

    assert planned(step(engine)) == [(scored, 10)]


def test_siblings_start_when_the_prompt_is_computed_and_share_its_pages() -> None:
    engine = scheduler()
    leader, sibling = sequence([1] * 20), sequence([1] * 20)
    leader.followers = [sibling]
    engine.add(leader)

    assert planned(step(engine)) == [(leader, 16)]
    assert planned(step(engine)) == [(leader, 4)]
    assert planned(step(engine)) == [(leader, 1), (sibling, 4)]
    drain(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_sequence_can_end_at_any_stage(steps: int) -> None:
    engine = scheduler(max_batch_size=2)
    others = [sequence([1, 2, 3]), sequence([4, 5, 6])]
    for each in others:
        engine.add(each)
    victim = sequence(list(range(30)))
    engine.add(victim)
    for _ in range(steps):
        step(engine)

    engine.finish(victim)
    check(engine)
    drain(engine)
    assert [len(each.output) for each in others] == [4, 4]


def test_ending_while_the_step_is_on_its_way_commits_nothing() -> None:
    engine = scheduler()
    engine.add(victim := sequence([1] * 8))
    plan = engine.schedule()
    engine.finish(victim)
    engine.commit(plan)
    check(engine)

    assert victim.num_computed == 0
    assert engine.kv.match([1] * 9).depth == 0


def test_a_step_can_be_planned_before_the_last_one_has_landed() -> None:
    engine = scheduler()
    only = sequence([1] * 20, max_tokens=3)
    engine.add(only)
    plans = [start(engine) for _ in range(2)]
    assert [plan.counts for plan in plans] == [[16], [4]]
    assert (only.num_computed, only.num_scheduled, only.num_tokens) == (0, 20, 21)

    land(engine, plans[0])
    plans.append(start(engine))
    assert (only.num_computed, only.num_scheduled, only.num_tokens) == (16, 21, 22)
    land(engine, plans[1])
    assert only.output == [0] and only.pending == 1
    plans.append(start(engine))
    assert [plan.outputs for plan in plans] == [[-1], [0], [1], [2]]
    assert not start(engine).sequences, "the last token is on its way"
    for plan in plans[2:]:
        land(engine, plan)
    assert only.finish_reason == "length" and not engine.has_work


def test_only_what_has_landed_is_offered_to_others() -> None:
    engine = scheduler()
    engine.add(sequence([1] * 9))
    first = start(engine)
    engine.add(sequence([1] * 9))
    second = start(engine)
    assert planned(second)[1][1] == 9
    land(engine, first)
    land(engine, second)
    engine.add(sequence([1] * 9))
    assert planned(start(engine))[2][1] == 1


def test_a_preempted_sequence_waits_for_its_token_and_nobody_overtakes_it() -> None:
    engine = scheduler(num_pages=4)
    first, second, third = sequence([1] * 7), sequence([2] * 7), sequence([3])
    for each in (first, second, third):
        engine.add(each)
    land(engine, start(engine))
    flights = [start(engine), start(engine)]
    assert (second.status, second.pending) == (Status.WAITING, 1)
    engine.finish(first)
    assert not start(engine).sequences

    for flight in flights:
        land(engine, flight)
    assert second.output == [0, 0], "the pages were its own when the step began"
    plan = start(engine)
    assert planned(plan) == [(second, 5), (third, 1)], "a page of it was cached"
    land(engine, plan)
    drain(engine)
    assert len(second.output) == 4


def test_a_step_is_not_committed_to_pages_that_a_sequence_got_after_it_began() -> None:
    engine = scheduler(num_pages=14)
    first, slow = sequence([1] * 15, max_tokens=8), sequence([1] * 40)  # 4 and 10 pages
    engine.add(first)
    engine.add(slow)
    flights = [start(engine), start(engine)]
    land(engine, flights.pop(0))
    flights.append(start(engine))
    assert engine.stats.num_preemptions == 1
    assert slow in flights[1].admitted, "it needs fewer pages, now that some can be shared"

    land(engine, flights.pop(0))
    assert (slow.num_computed, slow.num_scheduled) == (12, 27)
    land(engine, flights.pop(0))
    assert slow.num_computed == 27
    drain(engine)


def test_siblings_start_though_their_leader_lost_its_pages_meanwhile() -> None:
    engine = scheduler(num_pages=4)
    first, leader, sibling = sequence([1] * 7), sequence([2] * 7, 1), sequence([2] * 7, 1)
    leader.followers = [sibling]
    engine.add(first)
    land(engine, start(engine))
    engine.add(leader)
    flights = [start(engine), start(engine)]
    assert leader in flights[0].admitted
    engine.finish(first)
    for flight in flights:
        land(engine, flight)
    assert leader.finish_reason == "length" and engine.waiting == [sibling]
    drain(engine)


@pytest.mark.parametrize("policy", ["max_utilization", "guaranteed_no_evict"])
def test_a_flood_of_later_requests_does_not_starve_a_large_one(policy: str) -> None:
    engine = scheduler(num_pages=8, scheduler_policy=policy)
    for _ in range(6):
        engine.add(sequence([1] * 5))
    large = sequence(list(range(28)), max_tokens=4)  # needs every page
    engine.add(large)
    for _ in range(40):
        engine.add(sequence([2, 3, 4]))
        step(engine)
    assert large.finish_reason == "length"


def test_max_tokens_is_clamped_to_the_room_after_the_prompt() -> None:
    engine = scheduler(num_pages=10)  # 40 tokens of 64
    assert engine.clamp_max_tokens(10, 5) == 5
    assert engine.clamp_max_tokens(10, None) == 31
    assert scheduler().clamp_max_tokens(60, 100) == 4
    assert engine.clamp_max_tokens(40, 1) == 1


@pytest.mark.parametrize("length", [0, 64, 100])
def test_an_impossible_prompt_is_refused(length: int) -> None:
    with pytest.raises(
        InvalidRequestError, match=f"has {length} tokens; this engine takes 1 to 63"
    ):
        scheduler().clamp_max_tokens(length, 1)


@pytest.mark.parametrize(("length", "max_tokens"), [(41, None), (41, 1), (30, 12)])
def test_what_can_never_fit_in_the_pages_is_refused(length: int, max_tokens: int | None) -> None:
    with pytest.raises(CapacityError, match=r"KV cache of 10 pages \(40 tokens\)"):
        scheduler(num_pages=10).clamp_max_tokens(length, max_tokens)


def cache(name: str, window: int = 0) -> CacheSpec:
    return CacheSpec(name, "paged", (), (), PAGE, window)


CACHES = [
    (),
    (cache("kv"), cache("near", window=6)),
    (cache("near", window=5), cache("nearest", window=1)),
    (cache("kv"), CacheSpec("states", "state", (), ())),
]


@dataclass(frozen=True)
class Arrival:
    after_steps: int
    prompt: list[int]
    max_tokens: int
    priority: int
    abort_after: int | None
    stop_after: int


_ARRIVALS = st.lists(
    st.builds(
        Arrival,
        after_steps=st.integers(0, 3),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        abort_after=st.none() | st.integers(0, 12),
        stop_after=st.integers(1, 20),
    ),
    min_size=1,
    max_size=10,
)


@given(
    arrivals=_ARRIVALS,
    num_pages=st.integers(3, 14),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    caching=st.booleans(),
    ahead=st.booleans(),
    draft_tokens=st.sampled_from([0, 1, 3]),
    caches=st.sampled_from(CACHES),
)
@settings(max_examples=400, deadline=None)
def test_every_sequence_ends_and_every_page_returns(
    arrivals: list[Arrival],
    num_pages: int,
    policy: str,
    caching: bool,
    ahead: bool,
    draft_tokens: int,
    caches: tuple[CacheSpec, ...],
) -> None:
    engine = scheduler(
        num_pages,
        caches,
        draft_tokens,
        scheduler_policy=policy,
        enable_prefix_caching=caching,
    )
    ages: dict[Sequence, int] = {}
    wanted: dict[Sequence, int | None] = {}
    flights: list[StepPlan] = []
    for arrival in arrivals:
        try:
            limit = engine.clamp_max_tokens(len(arrival.prompt), arrival.max_tokens)
        except CapacityError:
            continue
        new = sequence(arrival.prompt, limit, arrival.priority, arrival.stop_after)
        wanted[new], ages[new] = arrival.abort_after, 0
        engine.add(new)
        for _ in range(arrival.after_steps):
            _step_and_abort(engine, ages, wanted, flights, ahead)
    for _ in range(1000):
        if not (engine.has_work or flights):
            break
        _step_and_abort(engine, ages, wanted, flights, ahead)

    assert all(each.status is Status.FINISHED for each in wanted)
    assert all(len(s.output) == s.max_tokens for s in wanted if s.finish_reason == "length")
    assert all(
        len(s.output) == s.request.params.min_tokens for s in wanted if s.finish_reason == "stop"
    )
    assert all(wanted[s] is not None for s in wanted if s.finish_reason is None)
    assert engine.kv.usage == 0
    if policy == "guaranteed_no_evict":
        assert engine.stats.num_preemptions == 0


def _step_and_abort(
    engine: Scheduler,
    ages: dict[Sequence, int],
    wanted: dict[Sequence, int | None],
    flights: list[StepPlan],
    ahead: bool,
) -> None:
    had_work = engine.has_work
    plan = start(engine)
    assert plan.sequences or flights or not had_work, "work without progress"
    assert had_work or not plan.sequences
    _nobody_is_overtaken(engine, plan)
    if plan.sequences:
        flights.append(plan)
    if flights and (len(flights) > ahead or not plan.sequences):
        land(engine, flights.pop(0))
    for each in wanted:
        ages[each] += 1
        if each.status is not Status.FINISHED and ages[each] == wanted[each]:
            engine.finish(each)
            check(engine)


def _nobody_is_overtaken(engine: Scheduler, plan: StepPlan) -> None:
    """What was admitted stood before all that still waits."""
    if plan.admitted and engine.waiting:
        assert max(each.order for each in plan.admitted) < engine.waiting[0].order
