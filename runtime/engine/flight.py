"""A step on its way."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepResult
from slipstream.runtime.executors.base import PendingStep, StartedStep


@dataclass(slots=True)
class Flight:
    """A step on its way, and whose logits rows it computes.

    ``positions`` are those of its rows, which change with the next step. It is ``started`` until
    its rows are sampled, ``pending`` from then on. ``refused``: there is nothing on its way, and
    nothing may follow before that is told. ``idle`` tells for how many seconds a device that could
    have run ahead waited for it.
    """

    plan: StepPlan
    owners: list[Sequence]
    rows: list[SamplingRow]
    positions: list[int]
    started: StartedStep
    pending: PendingStep | None = None
    refused: bool = False
    idle: float = 0.0

    def runs(self, result: StepResult) -> dict[Sequence, list[int]]:
        """The tokens in which each sequence has ended the step."""
        runs: dict[Sequence, list[int]] = {}
        for sequence, row, token in zip(self.owners, self.rows, result.token_ids, strict=True):
            if row.target is None and token != REJECTED:
                runs.setdefault(sequence, []).append(token)
        return runs


@dataclass(frozen=True, slots=True)
class Refused:
    """A step that the device did not take; it ends in its turn, as one that failed."""

    error: Exception

    def sample(self) -> PendingStep:
        """Nothing."""
        return self

    def result(self) -> StepResult:
        """Raise what the device raised."""
        raise self.error


def step_failed(cause: Exception) -> ExecutionError:
    """What requests of a step are told that the device has failed."""
    error = ExecutionError(
        f"a step failed on the device: {cause}. The requests in it have ended and the engine goes"
        " on; send them again, and restart the engine if it recurs"
    )
    error.__cause__ = cause
    return error
