"""The engine as every server sees it: admission, metrics and an orderly end around it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.request import OutputKind, RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.limits import MAX_SEQUENCES
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.core.logs import log_event
from slipstream.server.core.merge import merge
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.refusal import Refusal

_LOG = logging.getLogger(__name__)
_SHUTTING_DOWN = "the server is shutting down; send the request again to another one, or later"

# An output, and of which of a request's prompts.
Item = tuple[int, RequestOutput]


@dataclass(frozen=True, slots=True)
class Job:
    """What one request of a client asks of the engine."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    kind: OutputKind
    priority: int = 0


class Observer(Protocol):
    """Who hears of one prompt, to count."""

    def see(self, output: RequestOutput) -> None:
        """Hear an output of kind ``delta`` or ``final``."""
        ...

    def close(self, reason: Literal["abort", "error"]) -> None:
        """Hear that there is no last output."""
        ...


class Metrics(Protocol):
    """Who counts."""

    @property
    def mean_latency(self) -> float:
        """Mean seconds that a request took."""
        ...

    def watch(self) -> Observer:
        """An observer for one prompt; it is used in the event loop only."""
        ...


@dataclass(frozen=True, slots=True)
class _Track:
    """One prompt of a job on its way through the engine."""

    position: int
    observer: Observer
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Service:
    """One engine behind one server; belongs to one event loop."""

    def __init__(self, llm: AsyncLLM, options: ServerOptions, metrics: Metrics) -> None:
        self.llm = llm
        self.options = options
        self.names = list(options.served_model_name)
        self.created = int(time.time())
        self.metrics = metrics
        self.texts = TokenTexts(llm.tokenizer)
        self.draining = False
        self._open = 0  # prompts that run or wait, those on their way to the engine included
        self._running: set[str] = set()
        self._idle = asyncio.Event()

    @property
    def unavailable(self) -> str | None:
        """Why no request is taken now."""
        return self.llm.unhealthy or (_SHUTTING_DOWN if self.draining else self.llm.closed)

    def model(self, name: str | None) -> str:
        """The name to answer with; raises ``Refusal`` for a model that is not served."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise Refusal(
                "not_found",
                f"there is no model {name!r:.100}; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    async def run(self, job: Job) -> AsyncGenerator[Item, None]:
        """The outputs of all prompts as they come; closing or cancelling this aborts them.

        Raises ``Refusal`` if the server takes no more, or ends the request; and what
        ``AsyncLLM.generate`` raises.
        """
        with self._admission(job), self._tracking(job) as tracks:
            runs = [self._generate(job, track) for track in tracks.values()]
            async with aclosing(runs[0] if len(runs) == 1 else merge(runs)) as outputs:
                async for output in outputs:
                    track = tracks[output.request_id]
                    track.observer.see(output)
                    if output.finished and _aborted(output):
                        raise Refusal("unavailable", _SHUTTING_DOWN)
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
        except (InvalidRequestError, CapacityError, Refusal):  # never begun, or seen to its end
            raise
        except (asyncio.CancelledError, GeneratorExit):
            _close(tracks, "abort")
            raise
        except Exception:
            _close(tracks, "error")
            raise
        finally:
            self._running -= tracks.keys()

    async def drain(self) -> None:
        """Take no more requests and wait for the open ones; abort those that last too long."""
        self.draining = True
        self.llm.stop_rendering()  # what still waits for its prompt would be refused then
        timeout = self.options.drain_timeout
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
            raise Refusal("unavailable", self.unavailable)
        count = len(job.prompts)
        if not 1 <= count * job.params.n <= MAX_SEQUENCES:
            raise Refusal(
                "invalid",
                f"{count} prompts of {job.params.n} completions each; one request takes 1 to "
                f"{MAX_SEQUENCES} completions. Send several requests",
                param="prompt",
            )
        if self._open >= self.llm.config.max_batch_size + self.options.max_queued_requests:
            raise Refusal(
                "busy",
                f"{self._open} requests run or wait already; send this one again later",
                code="queue_full",
                retry_after=self._wait_estimate(),
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
        return math.ceil(min(max(self.metrics.mean_latency, 1), 60))


def _close(tracks: Mapping[str, _Track], reason: Literal["abort", "error"]) -> None:
    for track in tracks.values():
        track.observer.close(reason)


def _aborted(output: RequestOutput) -> bool:
    return any(completion.finish_reason == "abort" for completion in output.outputs)
