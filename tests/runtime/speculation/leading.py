"""A counting device that keeps what it guesses, and verifies that before the host has seen any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepBatch, StepResult
from slipstream.runtime.executors.counting import CountingExecutor, CountingStep, run_length
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine


@dataclass
class Rows:
    """Guesses of each sequence of a step."""

    made: list[list[int]]

    def rows(self) -> list[list[int]]:
        return self.made


class LeadingDevice(CountingExecutor):
    """After each step it guesses as many tokens as it is told, some of which are right.

    ``events`` are "start" and "land"; ``drafts`` are those of every step.
    """

    guesses = 7
    verifies_unseen = True

    def __init__(self, *given: Any, **more: Any) -> None:  # noqa: ANN401
        super().__init__(*given, **more)
        self.events: list[str] = []
        self.drafts: list[list[int]] = []
        self.waited: list[bool] = []  # whether steps with drafts had to know all tokens
        self._kept: dict[int, list[int]] = {}  # by slot

    def guess_seconds(self) -> dict[tuple[int, int], float]:
        return {}

    def submit(self, batch: StepBatch) -> CountingStep:
        self.events.append("start")
        self.drafts.append(list(batch.drafts))
        return super().submit(batch)

    def land(self, step: CountingStep) -> None:
        self.events.append("land")
        super().land(step)

    def guessed(self, slot: int, last: tuple[int, int], count: int, row: SamplingRow) -> list[int]:
        kept = self._kept.get(slot, [])
        if any(step.failed for step in self._on_their_way):
            kept = [*kept, *[0] * count]
        assert len(kept) >= count, "more drafts than there are guesses"
        return [max(token, 0) for token in kept[:count]]

    def _spoil(self, batch: StepBatch) -> None:
        super()._spoil(batch)
        self._kept.update((slot, []) for slot in batch.slots.tolist())

    def _run(self, planned: StepBatch, excused: bool) -> StepResult:
        before = dict(self._kept)
        result = super()._run(planned, excused)
        told, result.right, guesses = planned.guessing, [], []
        for index, slot in enumerate(planned.slots.tolist()):
            begin, end = planned.query_start[index : index + 2].tolist()
            rows = [
                (result.token_ids[place], row)
                for place, (at, row) in enumerate(
                    zip(planned.logits_rows.tolist(), planned.sampling, strict=True)
                )
                if begin <= at < end and row.target is None
            ]
            run = [token for token, _ in rows if token != REJECTED]
            right = 0
            for token, guess in zip(run, before.get(slot, []), strict=False):
                if token != max(guess, 0):
                    break
                right += 1
            result.right.append(right)
            self._kept[slot] = []
            if run and told is not None:
                position = int(planned.positions[begin]) + len(run)
                last = (run[-1], position)
                made = self._made(last, told.count, rows[0][1])
                self._kept[slot] = made
            guesses.append(self._kept[slot] or [7] * (told.count if told else 0))
        if told is not None:
            result.guesses = Rows(guesses)
        return result

    def _made(self, last: tuple[int, int], count: int, row: SamplingRow) -> list[int]:
        token, right = last[0], run_length(*last, count) - 1
        made: list[int] = []
        for place in range(count):
            token = self._next(token, row)
            made.append(token if place < right else VOCAB_SIZE if place == right else -1)
        return [token if token < VOCAB_SIZE else 0 for token in made]


def leading_engine(num_pages: int = 64, **options: Any) -> tuple[LoadedEngine, LeadingDevice]:  # noqa: ANN401
    """The counting model on such a device."""
    given = {"runs_ahead": True, "speculative": "eagle3", "num_speculative_tokens": 3, **options}
    engine = counting_engine(num_pages, **given)
    inner = engine.executor
    assert isinstance(inner, CountingExecutor)
    device = LeadingDevice(num_pages, inner._graphs, engine.caches, runs_ahead=True)
    return replace(engine, executor=device), device
