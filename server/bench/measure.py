"""Runs requests through an engine loop and notes when everything happened."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

from slipstream.errors import InvalidRequestError
from slipstream.runtime.engine.host_pages import HostSpace, Transfer
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.executors.base import (
    Executor,
    OffloadingExecutor,
    PendingStep,
    PreparingExecutor,
    StartedStep,
    TimedExecutor,
)
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.request_factory import RequestFactory
from slipstream.runtime.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Random prompts of ``input_len`` tokens and greedy answers of exactly ``output_len``."""

    input_len: int
    output_len: int
    seed: int


@dataclass(slots=True)
class Trace:
    """When a request was sent and when each of its tokens came, in seconds."""

    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(slots=True)
class Measurement:
    """Requests that ran together.

    ``waits`` are the seconds from each answer of the executor to the next step's start, none if
    that has begun before: what the loop costs outside of it.
    """

    traces: list[Trace]
    seconds: float
    waits: list[float]
    steps: int
    preemptions: int


class Stopwatch:
    """An executor that notes how long it was left idle between steps."""

    def __init__(self, inner: Executor) -> None:
        self.waits: list[float] = []
        self.steps = 0
        self._inner = inner
        self._answered: float | None = None
        self._on_their_way = 0

    def start(self) -> None:
        """Begin anew; the time until the next step is nobody's."""
        self.waits, self.steps, self._answered = [], 0, None

    @property
    def runs_ahead(self) -> bool:
        """As the inner executor."""
        return self._inner.runs_ahead

    @property
    def draft_tokens(self) -> int:
        """As the inner executor."""
        return self._inner.draft_tokens

    @property
    def max_drafts(self) -> int:
        """As the inner executor."""
        return self._inner.max_drafts

    def reserve_kv(self, num_bytes: int | None) -> int:
        """As the inner executor."""
        return self._inner.reserve_kv(num_bytes)

    def submit(self, batch: StepBatch) -> StartedStep:
        """As the inner executor."""
        if self._on_their_way:
            self.waits.append(0.0)
        elif self._answered is not None:
            self.waits.append(time.perf_counter() - self._answered)
        started = self._inner.submit(batch)
        self.steps += 1
        self._on_their_way += 1
        return _TimedStart(self, started)

    def answered(self) -> None:
        """A step's result, or its failure, was handed over."""
        self._answered = time.perf_counter()
        self._on_their_way -= 1

    def shutdown(self) -> None:
        """As the inner executor."""
        self._inner.shutdown()


class _Offloading:
    """What a stopwatch also has where its executor keeps pages on the host."""

    _inner: Any

    @property
    def stored(self) -> Traffic:
        """As the inner executor."""
        stored: Traffic = self._inner.stored
        return stored

    @property
    def loaded(self) -> Traffic:
        """As the inner executor."""
        loaded: Traffic = self._inner.loaded
        return loaded

    def reserve_host(self, num_bytes: int, file: str | None) -> HostSpace:
        """As the inner executor."""
        space: HostSpace = self._inner.reserve_host(num_bytes, file)
        return space

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """As the inner executor."""
        self._inner.transfer(transfers)


class _Timed:
    """What a stopwatch also has where its executor knows what steps cost."""

    _inner: Any

    def step_seconds(self) -> dict[int, float]:
        """As the inner executor."""
        seconds: dict[int, float] = self._inner.step_seconds()
        return seconds


class _Preparing:
    """What a stopwatch also has where its executor gets ready for steps to come."""

    _inner: Any

    def prepare_next(self) -> bool:
        """As the inner executor."""
        more: bool = self._inner.prepare_next()
        return more


_PARTS: Mapping[type, type] = MappingProxyType(
    {OffloadingExecutor: _Offloading, TimedExecutor: _Timed, PreparingExecutor: _Preparing}
)


def watched(executor: Executor) -> Stopwatch:
    """A stopwatch that can do what ``executor`` can."""
    parts = tuple(part for can, part in _PARTS.items() if isinstance(executor, can))
    kind: type[Stopwatch] = type(Stopwatch.__name__, (*parts, Stopwatch), {})
    return kind(executor)


@dataclass(frozen=True, slots=True)
class _TimedStart:
    executor: Stopwatch
    inner: StartedStep

    def sample(self) -> PendingStep:
        return _TimedStep(self.executor, self.inner.sample())


@dataclass(frozen=True, slots=True)
class _TimedStep:
    executor: Stopwatch
    inner: PendingStep

    def result(self) -> StepResult:
        try:
            return self.inner.result()
        finally:
            self.executor.answered()


class Bench:
    """An engine loop under measurement."""

    def __init__(self, engine: LoadedEngine, workload: Workload) -> None:
        """Raises ``InvalidRequestError`` for a workload that the engine would cut short."""
        longest = engine.config.max_seq_len
        if workload.input_len + workload.output_len > longest:
            raise InvalidRequestError(
                f"input-len {workload.input_len} and output-len {workload.output_len} are more than"
                f" the engine's max_seq_len of {longest}; lower one of them"
            )
        self._executor = watched(engine.executor)
        self._loop = EngineLoop(replace(engine, executor=self._executor))
        self._factory = RequestFactory(engine)
        self._workload = workload
        self._vocabulary = range(engine.vocab_size)
        self._random = random.Random(workload.seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.shutdown()

    def prepare(self) -> None:
        """Do what a server does while nobody asks."""
        while self._loop.prepare():
            pass

    def measure(
        self, count: int, concurrency: int, progress: Callable[[int], None] = lambda done: None
    ) -> Measurement:
        """Run ``count`` new requests, at most ``concurrency`` of them at a time.

        ``progress`` is told how many have ended.
        """
        requests = [self._request() for _ in range(count)]
        preemptions = self._loop.stats.num_preemptions
        self._executor.start()
        started = time.perf_counter()
        traces = self._run(requests, concurrency, progress)
        return Measurement(
            traces=traces,
            seconds=time.perf_counter() - started,
            waits=self._executor.waits,
            steps=self._executor.steps,
            preemptions=self._loop.stats.num_preemptions - preemptions,
        )

    def _request(self) -> Request:
        length = self._workload.output_len
        params = SamplingParams(
            temperature=0, max_tokens=length, min_tokens=length, ignore_eos=True
        )
        prompt = self._random.choices(self._vocabulary, k=self._workload.input_len)
        return self._factory.request(prompt, params, output_kind="delta")

    def _run(
        self, requests: Sequence[Request], concurrency: int, progress: Callable[[int], None]
    ) -> list[Trace]:
        traces: dict[str, Trace] = {}
        waiting = list(reversed(requests))
        running = 0
        while waiting or running:
            while waiting and running < concurrency:
                request = waiting.pop()
                traces[request.request_id] = Trace(time.perf_counter())
                self._loop.add_request(request)
                running += 1
            outputs = self._loop.step()
            _note(outputs, traces)
            ended = sum(output.finished for output in outputs)
            if ended:
                running -= ended
                progress(len(requests) - len(waiting) - running)
        return list(traces.values())


def _note(outputs: Iterable[RequestOutput], traces: dict[str, Trace]) -> None:
    now = time.perf_counter()
    for output in outputs:
        if output.error is not None:
            raise output.error
        traces[output.request_id].tokens += [now] * len(output.outputs[0].token_ids)
