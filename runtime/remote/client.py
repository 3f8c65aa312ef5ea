"""The asking side: an engine of another process, as ``AsyncLLM`` gives one of this process."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.engine.request_state import (
    CompletionState,
    Ending,
    RequestState,
    sequences_of,
)
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.front_end import FrontEnd
from slipstream.runtime.loaded_engine import Model
from slipstream.runtime.remote.link import Link
from slipstream.runtime.remote.messages import (
    Abort,
    Begin,
    Begun,
    Ended,
    Failed,
    Parcel,
    Stop,
    Told,
)
from slipstream.runtime.request import OutputKind, Request, RequestMetrics, RequestOutput, id_in_use
from slipstream.runtime.request_factory import RequestFactory
from slipstream.runtime.structured.output import StructuredOutput

_LOST = "the engine's process has ended; the server must be started again"


@dataclass(slots=True, eq=False)
class _Completion:
    """One of the sequences of a request, and what has come of it that nobody has read yet."""

    state: CompletionState
    stream: _Stream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: Ending | None = None

    def read(self) -> bool:
        """Make what has come a part of the answer; whether it came to its end by a stop string,
        which the engine does not know of."""
        token_ids, logprobs, ending = self.token_ids, self.logprobs, self.ending
        self.token_ids, self.logprobs, self.ending = [], [], None
        if self.state.sequence.finish_reason:
            return False
        self.state.follow(token_ids, logprobs, ending)
        return ending is None and self.state.sequence.finish_reason is not None


@dataclass(slots=True, eq=False)
class _Stream:
    """A request on its way; everything of it belongs to the event loop."""

    number: int
    state: RequestState
    completions: list[_Completion] = field(default_factory=list)
    waiter: asyncio.Future[None] | None = None
    news: bool = False
    error: SlipstreamError | None = None  # after what has come before

    def wake(self) -> None:
        """There is something to read."""
        self.news = True
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """Return when there is; what comes until then is read at once."""
        if not self.news:
            self.waiter = event_loop.create_future()
            await self.waiter
        self.news = False


class RemoteLLM(FrontEnd):
    """An ``EngineClient`` for an engine in another process; belongs to one event loop."""

    def __init__(self, model: Model, link: Link) -> None:
        """For the engine at the other end of ``link``, which is described by ``model``."""
        self._prepare(model, RequestFactory(model, compiles=False))
        self._model = model
        self._link = link
        self._event_loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._completions: dict[int, _Completion] = {}
        self._closed: str | None = None
        self._unhealthy: str | None = None

    @property
    def closed(self) -> str | None:
        """Why no request is taken any more; None while they are."""
        return self._closed

    @property
    def unhealthy(self) -> str | None:
        """Why the engine was given up, for good; None while it works."""
        return self._unhealthy

    def check_health(self) -> bool:
        """Whether the engine works; its own process looks after it."""
        return self._unhealthy is None

    async def fetch_stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        stats: EngineStats = await self._link.ask("stats")
        return stats

    async def abort(self, request_id: str) -> None:
        """End a request within one step; its iterator ends with ``finish_reason`` ``"abort"``."""
        if (stream := self._streams.get(request_id)) is not None:
            self._link.send(Abort(stream.number))

    def shutdown(self) -> None:
        """End what is running; the engine goes on."""
        self.stop_rendering()
        self._link.close()
        self.workers.shutdown()

    def received(self, message: Parcel | Ended) -> None:
        """Hear of a step, or of the end."""
        if isinstance(message, Ended):
            self._end(message.reason, message.reason if message.unhealthy else None)
            return
        for each in message.rest:
            self._take(each)
        find = self._completions.get
        for number, token in zip(message.numbers, message.token_ids, strict=True):
            completion = find(number)
            if completion is not None:
                completion.token_ids.append(token)
                completion.stream.wake()

    def lost(self) -> None:
        """Hear that the engine's process has ended."""
        self._end(_LOST, _LOST)

    async def _compile(self, form: StructuredOutput) -> None:
        """The engine's process does."""

    def _validate(self, request: Request) -> None:
        """The engine's process does."""

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """What the engine tells of a request, which is aborted where nobody hears it any more."""
        stream = self._open_stream(request)
        state, finished = stream.state, False
        try:
            while not finished:
                await stream.wait(self._event_loop)
                output = state.output() if self._read(stream) else None
                if state.error is not None:
                    raise state.error
                if output is not None:
                    finished = output.finished
                    yield output
                if stream.error is not None and not finished:
                    raise stream.error
        finally:
            self._forget(stream)
            if not state.finished:
                self._link.send(Abort(stream.number))

    def _open_stream(self, request: Request) -> _Stream:
        self._refuse_if_closed()
        if request.request_id in self._streams:
            raise id_in_use(request.request_id)
        sequences = sequences_of(request, 0, 0, 0, pooling=self._model.pooling)
        states = [CompletionState.of(each, self.tokenizer) for each in sequences]
        state = RequestState(request, states, RequestMetrics(arrival_time=time.monotonic()))
        number = next(self._numbers)
        for _ in sequences[1:]:
            next(self._numbers)
        stream = _Stream(number, state)
        stream.completions = [_Completion(each, stream) for each in states]
        self._streams[request.request_id] = stream
        self._completions.update(enumerate(stream.completions, number))
        # Tokens on the way are of use where a stop string may be among them, or they are told.
        kind: OutputKind = (
            "final" if request.output_kind == "final" and not request.params.stop else "delta"
        )
        self._link.send(Begin(number, replace(request, prompt=None, output_kind=kind)))
        return stream

    def _forget(self, stream: _Stream) -> None:
        self._streams.pop(stream.state.request.request_id, None)
        for number in range(stream.number, stream.number + len(stream.completions)):
            self._completions.pop(number, None)

    def _read(self, stream: _Stream) -> bool:
        """Make what has come of a request its state; whether there was anything."""
        state, found = stream.state, False
        for index, completion in enumerate(stream.completions):
            if completion.token_ids or completion.ending is not None:
                found = True
                try:
                    if completion.read():
                        self._link.send(Stop(stream.number, index))
                except SlipstreamError as error:  # of the tokenizer
                    state.fail(error)
        if state.finished and state.metrics.finished_time is None:
            state.metrics.finished_time = time.monotonic()
        return found

    def _take(self, message: Begun | Told | Failed) -> None:
        completion = self._completions.get(message.number)
        if completion is None:
            return
        stream = completion.stream
        match message:
            case Told():
                completion.token_ids += message.token_ids
                completion.logprobs += message.logprobs
                completion.ending = message.ending
                stream.wake()
            case Failed(_, error):
                self._fail(stream, error)
            case Begun():
                _begin(stream.state, message)

    def _fail(self, stream: _Stream, error: SlipstreamError) -> None:
        """End a request; what came before is told first."""
        self._forget(stream)
        stream.error = error
        stream.wake()

    def _end(self, reason: str, unhealthy: str | None) -> None:
        """Take no more, and end the open requests with an ``ExecutionError``."""
        self._closed = self._closed or reason
        self._unhealthy = self._unhealthy or unhealthy
        for stream in list(self._streams.values()):
            self._fail(stream, ExecutionError(self._closed))


def _begin(state: RequestState, begun: Begun) -> None:
    state.metrics.first_scheduled_time = begun.first_scheduled_time
    state.metrics.first_token_time = begun.first_token_time
    leader = state.completions[0].sequence
    leader.num_cached, leader.prompt_logprobs = begun.num_cached, begun.prompt_logprobs
    if leader.pool is not None:
        leader.pool.value = begun.pooled
