"""Runs an engine of several ranks: the steps of one scheduler on a process a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import LOGITS
from slipstream.builder.engine import Engine, weight_file
from slipstream.cores import usable_cores
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.executors.cpu import MAX_DRAFTS, default_kv_bytes, useful_threads
from slipstream.runtime.executors.ranks.group import RankGroup
from slipstream.runtime.executors.ranks.message import StepCodec
from slipstream.runtime.executors.ranks.protocol import Made, Step
from slipstream.runtime.sampling.sampler import Sampler

Arrays = dict[str, NDArray[Any]]


class RankExecutor:
    """The ``Executor`` of several ranks on a CPU, which share its cores.

    Ranks compute a step while the host asks what forms allow; rows are edited and sampled here,
    once, from the logits that the first rank has gathered.
    """

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        manifest = engine.manifest
        self._config, self._caches, self._ranks = config, manifest.caches, manifest.ranks
        cores = config.num_threads or usable_cores()
        size = (engine.path / weight_file(0)).stat().st_size
        useful = config.num_threads or useful_threads(size, manifest.caches)
        threads = max(1, min(cores // manifest.ranks, useful))
        self._sampler = Sampler(manifest.vocab_size, min(cores, threads * manifest.ranks))
        self._codec = StepCodec(manifest.graphs, manifest.caches)
        self.group = RankGroup(engine, replace(config, num_threads=threads))

    @property
    def lost(self) -> str | None:
        """Why ranks do not run any more; None while they do. May be read from any thread."""
        return self.group.lost

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate within ``num_bytes`` of all ranks together; see ``CPUExecutor.reserve_kv``."""
        if num_bytes is None:
            return self.group.reserve(default_kv_bytes(self._caches, self._config, self._ranks))
        return self.group.reserve(num_bytes // self._ranks)

    @property
    def runs_ahead(self) -> bool:
        """Never, as on one CPU."""
        return False

    @property
    def draft_tokens(self) -> int:
        """None."""
        return 0

    @property
    def max_drafts(self) -> int:
        """As many as one CPU verifies."""
        return MAX_DRAFTS

    def submit(self, batch: StepBatch) -> RankStep:
        """Tell all ranks of a step; they begin."""
        self.group.tell(Step(self._codec.write(batch, self.group.steps)))
        return RankStep(self, batch, self._sampler)

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled."""
        logits: NDArray[np.float32] = self.submit(batch).outputs()[LOGITS].copy()
        return logits

    def outputs(self) -> Arrays:
        """What the step on its way gives, in memory that the next one overwrites."""
        made = self.group.answers()[0]
        assert isinstance(made, list), made
        return {each.name: self._array(each) for each in made}

    def shutdown(self) -> None:
        """End the ranks."""
        self.group.close()

    def _array(self, made: Made) -> NDArray[Any]:
        return self.group.results.array(made.offset, made.shape, made.dtype)


@dataclass(slots=True)
class RankStep:
    """A step that ranks compute."""

    executor: RankExecutor
    batch: StepBatch
    sampler: Sampler

    def sample(self) -> RankStep:
        """Ask what forms allow, while the ranks compute."""
        self.sampler.constrain(self.batch.sampling)
        return self

    def outputs(self) -> Arrays:
        """Wait for what the step gives."""
        return self.executor.outputs()

    def result(self) -> StepResult:
        """Wait for the step, and sample; raises ``ExecutionError`` if a rank is lost."""
        return self.sampler.result(self.outputs(), self.batch)
