"""The executor of a rank that follows the first."""

from __future__ import annotations

from torch import Tensor

from slipstream.plugins.sampling import Kind
from slipstream.runtime.engine.step import IntArray, StepBatch
from slipstream.runtime.executors.cuda.executor import CUDAExecutor


class FollowingExecutor(CUDAExecutor):
    """Enqueues what the first rank does, in the same order; nothing comes back to the host.

    Whatever meets the other ranks must be done here too: graphs are captured when they are there.
    """

    _hidden: Tensor

    def layers(self, batch: StepBatch, *, eager: bool) -> None:
        """Make the moves of a step and enqueue its layers."""
        with self._device.work():
            self._move_pages(batch.moves)
            self._hidden = self.runner.layers(batch, batch.logits_rows, eager=eager)

    def head(self, padded: int, kind: Kind) -> None:
        """Enqueue the head of the first rows, and take the tokens that the first rank samples."""
        with self._device.work():
            self.runner.head(padded, kind)

    def rows(self, rows: IntArray) -> None:
        """Enqueue the head of these rows of the step."""
        with self._device.work():
            self.runner.logits_of(self._hidden, rows)

    def shutdown(self) -> None:
        """Let go of the GPU, and part."""
        super().shutdown()
        if self._team is not None:
            self._team.close()
