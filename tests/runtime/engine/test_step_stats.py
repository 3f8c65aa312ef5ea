"""How many steps there were, and how long they took."""

from __future__ import annotations

import pytest

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine.step_stats import StepStats
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine


def test_steps_that_wait_for_each_other_are_not_counted_twice() -> None:
    now = 0.0
    stats = StepStats(lambda: now)
    stats.began()
    now = 1.0
    stats.began()  # ahead of the first
    now = 4.0
    stats.landed(10)
    now = 6.0
    stats.landed(1)
    now = 100.0  # nothing was to be done
    stats.began()
    now = 103.0
    stats.landed(1)
    assert (stats.seconds.count, stats.seconds.sum) == (3, 4 + 2 + 3)
    assert (stats.tokens.count, stats.tokens.sum) == (3, 12)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_every_step_of_a_loop_is_counted_once(runs_ahead: bool) -> None:
    engine = counting_engine(runs_ahead=runs_ahead)
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine)
    for number, fails in enumerate((False, True, False)):
        engine.executor.fail_next = fails
        loop.add_request(
            Request(str(number), [0, 1, 2], SamplingParams(temperature=0, max_tokens=3))
        )
        while loop.has_work:
            loop.step()
    assert loop.stats.step_tokens.count == loop.stats.step_seconds.count == engine.executor.steps
    assert loop.stats.step_tokens.sum >= 3 + 3 + 3 + 2 + 2


def test_siblings_that_leave_room_to_others_are_deferred() -> None:
    loop = EngineLoop(counting_engine(64, max_batch_size=8))

    def stats(n: int, name: str) -> EngineStats:
        params = SamplingParams(n=n, temperature=0, max_tokens=20, ignore_eos=True)
        loop.add_request(Request(name, [0, 1, 2], params))
        for _ in range(4):
            loop.step()
        return loop.stats

    # The last row is kept from siblings.
    deferred = stats(12, "many")
    assert (deferred.num_running, deferred.num_waiting, deferred.num_deferred) == (7, 5, 5)
    full = stats(1, "one")
    assert (full.num_running, full.num_waiting, full.num_deferred) == (8, 5, 0)
    assert full.num_pages == loop.scheduler.kv.num_pages
    loop.abort("many")
    loop.abort("one")
    while loop.has_work:
        loop.step()
