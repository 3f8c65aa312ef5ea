"""A counting device that notes what it is told, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.runtime.speculation.hostile import hostile

from slipstream.builder.contract import CacheSpec, GraphSpec, ports_of
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.counting import CountingExecutor, CountingStep, counting_contract
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine


class Recorder(CountingExecutor):
    """Notes when steps are started and landed, and at which positions each sequence samples."""

    def __init__(
        self,
        num_pages: int,
        graphs: Mapping[str, GraphSpec],
        caches: tuple[CacheSpec, ...],
        *,
        runs_ahead: bool,
        draft_tokens: int,
    ) -> None:
        super().__init__(
            num_pages, graphs, caches, runs_ahead=runs_ahead, draft_tokens=draft_tokens
        )
        self.events: list[str] = []
        self.order: list[str] = []  # the events, and when rows are sampled
        self.refuse_next = self.refuse_head = False
        # The live output of a sequence, and the positions of its rows.
        self.sampled: dict[int, tuple[Sequence[int], list[int]]] = {}

    def submit(self, batch: StepBatch) -> CountingStep:
        if self.refuse_next:
            self.refuse_next = False
            raise RuntimeError("refused")
        self._note("start")
        for row in batch.sampling:
            if row.target is None:
                self.sampled.setdefault(id(row.output), (row.output, []))[1].append(row.position)
        return super().submit(batch)

    def check_head(self, step: CountingStep) -> None:
        if self.refuse_head:
            self.refuse_head = False
            raise RuntimeError("refused")
        self.order.append("sample")
        super().check_head(step)

    def land(self, step: CountingStep) -> None:
        self._note("land")
        super().land(step)

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.order.append(event)


def recorded(
    num_pages: int = 64,
    *,
    runs_ahead: bool = True,
    draft_tokens: int = 0,
    more: tuple[CacheSpec, ...] = (),
    **options: Any,  # noqa: ANN401 - fields of RuntimeConfig
) -> tuple[EngineLoop, Recorder]:
    """A loop whose model has ``more`` caches beside the usual one, and its device."""
    engine = counting_engine(num_pages, **options)
    graphs, caches = counting_contract(engine.config.page_size, VOCAB_SIZE)
    caches += more
    graphs = {name: replace(spec, inputs=tuple(ports_of(caches))) for name, spec in graphs.items()}
    executor = Recorder(num_pages, graphs, caches, runs_ahead=runs_ahead, draft_tokens=draft_tokens)
    with hostile():
        return EngineLoop(replace(engine, executor=executor, caches=caches)), executor
