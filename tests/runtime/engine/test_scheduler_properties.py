"""Whatever arrives and is aborted, every sequence ends and every page returns."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.runtime.engine.scheduling import (
    PAGE,
    check,
    land,
    scheduler,
    sequence,
    start,
)

from slipstream.builder.contract import CacheSpec
from slipstream.errors import CapacityError
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence, Status

pytestmark = pytest.mark.usefixtures("one_page_is_awaited")


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
    jumps: bool


_ARRIVALS = st.lists(
    st.builds(
        Arrival,
        after_steps=st.integers(0, 3),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        abort_after=st.none() | st.integers(0, 12),
        stop_after=st.integers(1, 20),
        jumps=st.booleans(),
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
@settings(max_examples=200, deadline=None)
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
        new = sequence(arrival.prompt, limit, arrival.priority, arrival.stop_after, arrival.jumps)
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
    """What was admitted stood before all that still waits, but one that passes a long prompt, and
    those before which nobody waits who does not await what is being computed."""
    waiting = [each for each in engine.waiting if not engine._admission.awaits(each)]
    if plan.admitted and waiting:
        late = [each for each in plan.admitted if each.order > waiting[0].order]
        beside = max((each.prompt_len for each in plan.sequences), default=0)
        assert not late or (late == plan.admitted[:1] and late[0].prompt_len <= beside)
