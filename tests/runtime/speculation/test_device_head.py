"""Guesses that a device makes after its steps, of which the host hears: on the counting model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.runtime.engine.driving import drain, greedy, tokens_of

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import REJECTED, StepBatch, StepResult
from slipstream.runtime.executors.base import PendingStep, StartedStep
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import Request
from slipstream.runtime.speculation.eagle3 import DeviceHeadProposer
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine


@dataclass
class Rows:
    """Guesses that are waited for only when they are read."""

    made: list[list[int]]
    broken: bool = False
    reads: int = 0

    def rows(self) -> list[list[int]]:
        self.reads += 1
        if self.broken:
            raise RuntimeError("the device is gone")
        return self.made


@dataclass
class Counted:
    """A step that guesses on, from what every sequence has sampled last, up to a wrong one."""

    step: Any
    batch: StepBatch
    device: Device

    def sample(self) -> PendingStep:
        self.step = self.step.sample()
        return self

    def result(self) -> StepResult:
        result: StepResult = self.step.result()
        wanted = self.batch.guessing
        if wanted is not None:
            self.device.asked.append(wanted.count)
            self.device.held.append(wanted.capacity.tolist())
            result.guesses = Rows(
                [self._guess(result, s, wanted.count) for s in range(len(self.batch.drafts))],
                self.device.broken,
            )
            self.device.told.append(result.guesses)
        return result

    def _guess(self, result: StepResult, sequence: int, count: int) -> list[int]:
        end = int(self.batch.query_start[sequence + 1])
        rows = self.batch.logits_rows.tolist()
        if end - 1 not in rows:
            return [7] * count  # of no meaning, in the middle of a prompt
        last = rows.index(end - 1)
        run = result.token_ids[last - self.batch.drafts[sequence] : last + 1]
        token = [each for each in run if each != REJECTED][-1]
        right = [(token + 1 + i) % VOCAB_SIZE for i in range(count)]
        return [*right[: self.device.right], *[-1] * count][:count]


@dataclass
class Device:
    """A device with a head, ``right`` of whose guesses are there."""

    inner: Any
    right: int = 7
    broken: bool = False
    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)
    told: list[Rows] = field(default_factory=list)
    guesses: int = 7

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.inner, name)

    def guess_seconds(self) -> dict[tuple[int, int], float]:
        return self.seconds

    def submit(self, batch: StepBatch) -> StartedStep:
        return Counted(self.inner.submit(batch), batch, self)


def engine(device: dict[str, Any], **options: Any) -> tuple[LoadedEngine, Device]:  # noqa: ANN401
    made = counting_engine(runs_ahead=True, speculative="eagle3", **options)
    with_head = Device(made.executor, **device)
    return replace(made, executor=with_head), with_head


def run(loop: EngineLoop, count: int = 2, **params: Any) -> dict[str, list[int]]:  # noqa: ANN401
    for number in range(count):
        name = str(number)
        loop.add_request(Request(name, [number, number + 1], greedy(max_tokens=24, **params)))
    return {name: tokens_of(output) for name, output in drain(loop).items()}


WANTED = {str(n): [n + 2 + i for i in range(24)] for n in range(2)}


@pytest.mark.parametrize("right", [0, 2, 7])
def test_guesses_save_steps_and_change_nothing(right: int) -> None:
    made, device = engine({"right": right}, num_speculative_tokens=3)
    loop = EngineLoop(made)
    assert run(loop) == WANTED
    stats = loop.stats.speculation
    assert stats is not None and stats.num_accepted_tokens == stats.num_draft_tokens
    assert set(device.asked) == {3}
    if right == 0:
        assert not stats.num_drafts
    else:
        assert len(device.asked) <= 2 + 24 // (1 + min(right, 3)) + 1
        assert all(rows.reads == 1 for rows in device.told[:-1])
    assert all(each % 4 == 0 and each > 0 for held in device.held for each in held)


def test_a_request_that_wants_none_is_not_guessed_for() -> None:
    made, _ = engine({}, num_speculative_tokens=3)
    loop = EngineLoop(made)
    assert run(loop, speculative=False) == WANTED
    assert loop.stats.speculation is not None and not loop.stats.speculation.num_drafts


def test_a_device_that_fails_while_it_guesses_is_asked_no_more() -> None:
    made, device = engine({"broken": True}, num_speculative_tokens=3)
    assert run(EngineLoop(made)) == WANTED
    assert len(device.asked) < 4


@pytest.mark.parametrize(("guess", "less"), [(1e-9, False), (10.0, True)])
def test_load_decides_how_many_are_asked_for(guess: float, less: bool) -> None:
    """By what guesses were measured to take: where steps wait for them, ever more rarely."""
    made, device = engine(
        {"seconds": {(1, 7): guess, (64, 7): guess}}, num_speculative_tokens="auto"
    )
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-4
        return now

    loop = EngineLoop(made, clock=clock)
    for _ in range(3):
        assert run(loop) == WANTED
    assert (0 in device.asked) == less
    assert max(device.asked) == 7


def test_a_prompt_in_chunks_is_read_with_the_tokens_after_it() -> None:
    made, _ = engine({}, num_speculative_tokens=3, max_num_tokens=8, max_batch_size=4)
    seen: list[tuple[list[int], list[int]]] = []
    submit = made.executor.submit

    def keep(batch: StepBatch) -> StartedStep:
        assert batch.guessing is not None
        seen.append((batch.query_start.tolist(), batch.guessing.next_tokens.tolist()))
        return submit(batch)

    made.executor.submit = keep  # type: ignore[method-assign]
    loop = EngineLoop(made)
    loop.add_request(Request("r", list(range(20)), greedy(max_tokens=2)))
    assert tokens_of(drain(loop)["r"]) == [20, 21]
    assert [following for _, following in seen[:3]] == [[8], [16], [-1]]


def test_what_guesses_take_lies_between_what_was_timed() -> None:
    seconds = {(1, 0): 1.0, (1, 3): 4.0, (16, 3): 7.0, (64, 3): 10.0, (64, 7): 30.0}
    _, device = engine({"seconds": seconds})
    proposer = DeviceHeadProposer(device)
    assert proposer.counts == [3, 7]
    assert [proposer.seconds(n, 3) for n in (1, 6, 16, 40, 64, 99)] == [4, 5, 7, 8.5, 10, 10]
    assert proposer.seconds(16, 1) == 7 and proposer.seconds(1, 4) == 30
    assert proposer.seconds(5, 0) == 1 and proposer.seconds(5, 8) == 0
    _, unknown = engine({})
    assert not DeviceHeadProposer(unknown).counts and not DeviceHeadProposer(unknown).seconds(1, 0)
