"""A step on its way on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import SamplingRow, StepResult
from slipstream.runtime.executors.cuda.device import Event


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a step: their places in the batch, and how their answers are had."""

    places: Sequence[int]
    answer: Callable[[Sequence[SamplingRow]], StepResult]


@dataclass(frozen=True, slots=True)
class PendingCUDAStep:
    """The rows of a step in parts: those that the device samples, and those that the host does."""

    done: Event
    rows: Sequence[SamplingRow]
    parts: Sequence[Part]

    def result(self) -> StepResult:
        """Wait for the device, then answer every row in the order of the batch."""
        result = StepResult([-1] * len(self.rows), [None] * len(self.rows))
        try:
            self.done.wait()
            for part in self.parts:
                answers = part.answer([self.rows[place] for place in part.places])
                for place, token, entry in zip(
                    part.places, answers.token_ids, answers.logprobs, strict=True
                ):
                    result.token_ids[place], result.logprobs[place] = token, entry
                for row, failure in answers.failed.items():
                    result.failed[part.places[row]] = failure
        except RuntimeError as error:
            raise ExecutionError(f"the step failed on the GPU: {error}") from error
        return result
