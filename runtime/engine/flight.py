"""A step on its way."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepBatch, StepResult
from slipstream.runtime.executors.base import Executor, PendingStep, StartedStep


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

    @classmethod
    def begin(
        cls,
        executor: Executor,
        plan: StepPlan,
        batch: StepBatch,
        owners: list[Sequence],
        positions: list[int],
    ) -> Flight:
        """Give a step to the device; one that it does not take is ``refused``."""
        started: StartedStep
        try:
            started = executor.submit(batch)
        except Exception as error:  # noqa: BLE001 - whatever a device raises ends only this step
            started = refused = Refused(error)
            return cls(plan, owners, batch.sampling, positions, started, refused, refused=True)
        return cls(plan, owners, batch.sampling, positions, started)

    def sample(self) -> None:
        """Have the device sample its rows."""
        try:
            self.pending = self.started.sample()
        except Exception as error:  # noqa: BLE001 - whatever a device raises ends only this step
            self.pending, self.refused = Refused(error), True

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
