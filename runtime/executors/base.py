"""What the engine loop needs of a device."""

from __future__ import annotations

from typing import Protocol

from slipstream.runtime.step import StepBatch, StepResult


class PendingStep(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait for the step; raises ``ExecutionError`` if the device failed."""
        ...


class Executor(Protocol):
    """Runs steps of one loaded engine. Used from the engine-loop thread only."""

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate KV pages within ``num_bytes`` (None: the executor's own default) and return how
        many."""
        ...

    def submit(self, batch: StepBatch) -> PendingStep:
        """Start a step; may return before the device is done. At most one step is outstanding."""
        ...

    def shutdown(self) -> None:
        """Free the device."""
        ...
