"""Runs an engine of several ranks on as many GPUs; this process is the first rank."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from slipstream.builder.engine import Engine
from slipstream.plugins.collectives.cuda.multicast import leave_multicast_off
from slipstream.plugins.sampling import Kind
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.step import IntArray, StepBatch
from slipstream.runtime.executors.cuda.buckets import Buckets
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.drafter import Drafter
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.program import CUDAProgram
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.executors.cuda.team import Team, abort_group
from slipstream.runtime.executors.ranks.gpu.followers import Followers
from slipstream.runtime.executors.ranks.gpu.protocol import Close, Head, Meet, Reserve, Rows, Time

_PATIENCE = 5.0  # seconds until a GPU that still waits for a lost rank is left as it is


class LeadingRunner(StepRunner):
    """Runs steps, and tells followers to run the same before it does."""

    followers: Followers

    def layers(self, batch: StepBatch, rows: IntArray, *, eager: bool = False) -> Tensor:
        """See ``StepRunner.layers``."""
        self.followers.tell_step(replace(batch, logits_rows=rows), eager)
        with self.followers.explaining():
            return super().layers(batch, rows, eager=eager)

    def head(self, padded: int, kind: Kind) -> None:
        """See ``StepRunner.head``."""
        self.followers.tell(Head(padded, kind))
        with self.followers.explaining():
            super().head(padded, kind)

    def logits_of(self, hidden: Tensor, rows: IntArray) -> Tensor:
        """See ``StepRunner.logits_of``."""
        self.followers.tell(Rows(rows))
        with self.followers.explaining():
            return super().logits_of(hidden, rows)


class CUDARankExecutor(CUDAExecutor):
    """The ``Executor`` of several NVIDIA GPUs of one host.

    Steps run here as they do on one GPU, a step ahead, and in the processes of the other ranks,
    which are told what to enqueue and answer nothing: their GPUs and this one meet in the
    collectives of a step. The first rank samples, and gives the others its tokens. Where one is
    lost, what waits for it here is let go.
    """

    _runner_type = LeadingRunner

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        """Start the other ranks, put all weights on the GPUs, and meet.

        Raises what ``CUDAExecutor`` and ``Team`` do, and ExecutionError where a rank is lost.
        """
        leave_multicast_off()
        self.followers = Followers(engine, config)
        try:
            super().__init__(engine, config, 0, self._meet)
        except BaseException:
            self.followers.close()
            raise

    @property
    def lost(self) -> str | None:
        """Why ranks do not run any more; None while they do. May be read from any thread."""
        return self.followers.lost

    def reserve_kv(self, num_bytes: int | None) -> int:
        """See ``CUDAExecutor.reserve_kv``; ``num_bytes`` are those of all ranks together."""
        own = None if num_bytes is None else num_bytes // self.followers.ranks
        self.followers.tell(Reserve(own))
        try:
            pages = super().reserve_kv(own)
            self.followers.await_answers()
        except BaseException:  # the others wait for what this rank would have given them
            self.followers.close()
            if self._team is not None:
                self._team.abandon()
            self.shutdown()  # another engine of ranks may be loaded
            raise
        return pages

    def step_seconds(self) -> dict[int, float]:
        """See ``CUDAExecutor.step_seconds``."""
        self.followers.tell(Time())
        return super().step_seconds()

    def shutdown(self) -> None:
        """Let go of the GPUs."""
        team, self._team = self._team, None
        told = team is not None and self.followers.tell_last(Close())
        if self.lost is not None:
            self._device.watch = None  # it has told what there is to tell
        if team is not None and self._device.comes_to_rest(_PATIENCE):
            super().shutdown()
            team.close()
        self.followers.close(told=told)

    def _meet(self, device: Device) -> Team:
        self.followers.await_answers()  # their weights are there
        self.followers.tell(Meet())
        meeting, ranks = self.followers.meeting, self.followers.ranks
        self.followers.on_loss = abort_group
        team = Team(0, ranks, device, meeting, self.followers.check)
        device.watch, self.followers.on_loss = self.followers.check, team.abandon
        return team

    def _runner(
        self,
        program: CUDAProgram,
        buckets: Buckets,
        logits: Tensor | None = None,
        drafter: Drafter | None = None,
    ) -> StepRunner:
        assert drafter is None, "heads are refused beside several ranks when an engine is built"
        runner = super()._runner(program, buckets, logits)
        assert isinstance(runner, LeadingRunner)
        runner.followers = self.followers
        return runner
