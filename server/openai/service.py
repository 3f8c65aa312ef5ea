"""The engine as the HTTP handlers see it: admission, metrics and an orderly end around it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Literal

from slipstream.errors import ExecutionError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.request import OutputKind, RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.logs import log_event
from slipstream.server.metrics import EngineMetrics, RequestWatch, registry_of
from slipstream.server.openai.errors import ApiError
from slipstream.server.openai.logprobs import TokenTexts
from slipstream.server.openai.merge import merge
from slipstream.server.openai.options import ServerOptions

MAX_SEQUENCES = 2048  # completions that one HTTP request may ask for
_LOG = logging.getLogger(__name__)
_SHUTTING_DOWN = "the server is shutting down; send the request again to another one, or later"

# An output, and of which of a request's prompts.
Item = tuple[int, RequestOutput]


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks of the engine."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    kind: OutputKind
    priority: int = 0


@dataclass(frozen=True, slots=True)
class _Track:
    """One prompt of a job on its way through the engine."""

    position: int
    watch: RequestWatch
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Service:
    """One engine behind one server; belongs to one event loop."""

    def __init__(self, llm: AsyncLLM, options: ServerOptions) -> None:
        self.llm = llm
        self.options = options
        self.names = list(options.served_model_name)
        self.created = int(time.time())
        self.metrics = EngineMetrics(self.names[0], lambda: llm.stats)
        self.registry = registry_of(self.metrics)
        self.texts = TokenTexts(llm.tokenizer)
        self.draining = False
        self._open = 0
        self._running: set[str] = set()
        self._idle = asyncio.Event()

    @property
    def unavailable(self) -> str | None:
        """Why no request is taken now."""
        return _SHUTTING_DOWN if self.draining else self.llm.closed

    @property
    def num_open(self) -> int:
        """Prompts that run or wait, those on their way to the engine included."""
        return self._open

    def model(self, name: str | None) -> str:
        """The name to answer with; raises ``ApiError`` for a model that is not served."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404,
                f"there is no model {name!r:.100}; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    async def run(self, job: Job) -> AsyncGenerator[Item, None]:
        """The outputs of all prompts as they come; closing or cancelling this aborts them.

        Raises ``ApiError`` if the server takes no more, or ends the request; and what
        ``AsyncLLM.generate`` raises.
        """
        with self._admission(job), self._tracking(job) as tracks:
            runs = [self._generate(job, track) for track in tracks.values()]
            async with aclosing(runs[0] if len(runs) == 1 else merge(runs)) as outputs:
                async for output in outputs:
                    track = tracks[output.request_id]
                    track.watch.see(output)
                    if output.finished and _aborted(output):
                        raise ApiError(503, _SHUTTING_DOWN)
                    yield track.position, output

    def _generate(self, job: Job, track: _Track) -> AsyncGenerator[RequestOutput, None]:
        return self.llm.generate(
            job.prompts[track.position],
            job.params,
            track.request_id,
            priority=job.priority,
            output_kind=job.kind,
        )

    @contextmanager
    def _tracking(self, job: Job) -> Iterator[dict[str, _Track]]:
        """Names for the prompts of a job, and an account of how they ended, by name."""
        made = [_Track(position, self.metrics.watch()) for position in range(len(job.prompts))]
        tracks = {track.request_id: track for track in made}
        self._running |= tracks.keys()
        try:
            yield tracks
        except ExecutionError:
            _close(tracks, "error")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            _close(tracks, "abort")
            raise
        finally:
            self._running -= tracks.keys()

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait for the open ones; abort those that last longer."""
        self.draining = True
        log_event(_LOG, "draining", {"requests": self._open, "timeout": timeout})
        if self._open:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                log_event(_LOG, "aborting", {"requests": self._open}, logging.WARNING)
                for request_id in list(self._running):
                    await self.llm.abort(request_id)

    @contextmanager
    def _admission(self, job: Job) -> Iterator[None]:
        if self.unavailable is not None:
            raise ApiError(503, self.unavailable)
        count = len(job.prompts)
        if not 1 <= count * job.params.n <= MAX_SEQUENCES:
            raise ApiError(
                400,
                f"{count} prompts of {job.params.n} completions each; one request takes 1 to "
                f"{MAX_SEQUENCES} completions. Send several requests",
                param="prompt",
            )
        if self._open >= self.llm.config.max_batch_size + self.options.max_queued_requests:
            raise ApiError(
                429,
                f"{self._open} requests run or wait already; send this one again later",
                code="queue_full",
                headers={"Retry-After": str(self._wait_estimate())},
            )
        self._open += count
        try:
            yield
        finally:
            self._open -= count
            if not self._open:
                self._idle.set()

    def _wait_estimate(self) -> int:
        """Seconds until a place may be free: about what a request takes, of at least one."""
        latency = self.metrics.histograms["e2e_request_latency_seconds"]
        mean = latency.sum / max(1, latency.count)
        return math.ceil(min(max(mean, 1), 60))


def _close(tracks: Mapping[str, _Track], reason: Literal["abort", "error"]) -> None:
    for track in tracks.values():
        track.watch.close(reason)


def _aborted(output: RequestOutput) -> bool:
    return any(completion.finish_reason == "abort" for completion in output.outputs)
