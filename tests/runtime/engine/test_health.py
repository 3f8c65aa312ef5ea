from __future__ import annotations

from dataclasses import replace

import pytest

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.health import MAX_FAILURES, Health
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.executors.counting import (
    CountingExecutor,
    CountingStep,
    counting_contract,
)
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_device_that_fails_again_and_again_is_given_up() -> None:
    health = Health(10, Clock())
    for _ in range(MAX_FAILURES - 1):
        health.failed(ExecutionError("no"))
    assert health.reason is None
    health.succeeded()
    for _ in range(MAX_FAILURES):
        assert health.reason is None
        health.failed(ExecutionError("no memory"))
    assert health.reason and "failed 5 steps in a row, at last with: no memory" in health.reason
    health.succeeded()
    assert health.reason, "it is not trusted again"


def test_a_device_that_does_not_answer_is_given_up() -> None:
    clock = Clock()
    health = Health(10, clock)
    clock.now = 100
    assert health.reason is None, "nobody waits for it"
    health.began()
    clock.now = 110
    assert health.reason is None
    clock.now = 110.5
    assert health.reason and "step_timeout is 10" in health.reason
    health.ended()
    assert health.reason, "late is not healthy"


def test_the_time_between_steps_does_not_count() -> None:
    clock = Clock()
    health = Health(10, clock)
    for _ in range(5):
        health.began()
        clock.now += 9
        health.ended()
        clock.now += 9
    assert health.reason is None


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_the_loop_counts_failing_steps(runs_ahead: bool) -> None:
    engine = counting_engine(runs_ahead=runs_ahead)
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine)
    reasons = []
    for number in range(MAX_FAILURES):
        engine.executor.fail_next = True
        loop.add_request(Request(str(number), [0], SamplingParams(temperature=0, max_tokens=1)))
        while loop.has_work:
            loop.step()
        reasons.append(loop.unhealthy)
    assert reasons[:-1] == [None] * (MAX_FAILURES - 1)
    assert reasons[-1] and "was told to fail" in reasons[-1]


def test_a_device_that_hangs_when_the_loop_shuts_down_is_noticed() -> None:
    clock, engine = Clock(), counting_engine()
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine, clock=clock)
    land, noticed = engine.executor.land, list[str | None]()

    def hang(step: CountingStep) -> None:
        clock.now += engine.config.step_timeout + 1
        noticed.append(loop.unhealthy)
        land(step)

    engine.executor.land = hang  # type: ignore[method-assign]
    loop.add_request(Request("a", [0], SamplingParams(temperature=0, max_tokens=2)))
    loop.step()
    loop.shutdown()
    assert len(noticed) == 1 and noticed[0] and "has not answered" in noticed[0]


def test_a_loop_that_breaks_does_not_blame_the_device_later() -> None:
    clock, engine = Clock(), counting_engine()
    loop = EngineLoop(engine, clock=clock)
    loop.scheduler.schedule = None  # type: ignore[assignment,method-assign]
    loop.add_request(Request("a", [0], SamplingParams(temperature=0, max_tokens=2)))
    with pytest.raises(TypeError):
        loop.step()
    clock.now += engine.config.step_timeout + 1
    assert loop.unhealthy is None


class Poisoned(CountingExecutor):
    """No row of its steps is a number, as with weights that were overwritten; the steps succeed."""

    def __init__(self, sane_tokens: frozenset[int] = frozenset()) -> None:
        super().__init__(64, *counting_contract(4, VOCAB_SIZE))
        self.sane_tokens = sane_tokens

    def _run(self, planned: StepBatch, excused: bool) -> StepResult:
        result = super()._run(planned, excused)
        for row, token in enumerate(result.token_ids):
            if token not in self.sane_tokens:
                result.failed[row] = ExecutionError("the largest logit of a row is nan")
        return result


def test_an_engine_whose_every_row_fails_is_given_up_after_one_request() -> None:
    loop = EngineLoop(replace(counting_engine(), executor=Poisoned()))
    loop.add_request(Request("a", [5], SamplingParams(temperature=0, max_tokens=1)))
    told = []
    while loop.has_work:
        told += loop.step()
    assert [(output.request_id, str(output.error)) for output in told] == [
        ("a", "the largest logit of a row is nan")
    ]
    assert loop.unhealthy and "failed 5 steps in a row, at last with: the largest" in loop.unhealthy
    assert loop.stats.num_running == loop.stats.num_waiting == 0


def test_requests_whose_rows_fail_by_their_own_fault_do_not_end_the_engine() -> None:
    loop = EngineLoop(replace(counting_engine(), executor=Poisoned(frozenset([1]))))
    for number in range(3 * MAX_FAILURES):
        loop.add_request(Request(str(number), [5], SamplingParams(temperature=0, max_tokens=1)))
        while loop.has_work:
            for output in loop.step():
                assert output.request_id == str(number) and output.error
    assert loop.unhealthy is None
