"""The engine in a background thread, for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine_thread import EngineThread
from slipstream.runtime.front_end import FrontEnd
from slipstream.runtime.handover.staging import Staging
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import Request, RequestOutput, id_in_use
from slipstream.runtime.request_factory import RequestFactory
from slipstream.runtime.structured.output import StructuredOutput

_Event = RequestOutput | SlipstreamError


@dataclass(slots=True, eq=False)
class _Stream:
    """Where the outputs of one request go: a queue with one reader, at half the price of asyncio's.

    ``put`` and ``get`` belong to the event loop.
    """

    event_loop: asyncio.AbstractEventLoop
    _events: deque[_Event] = field(default_factory=deque)
    _waiter: asyncio.Future[None] | None = None

    def put(self, event: _Event) -> None:
        """Append an event and wake the reader."""
        self._events.append(event)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> _Event:
        """Wait for the next event."""
        while not self._events:
            self._waiter = self.event_loop.create_future()
            await self._waiter
        return self._events.popleft()


class AsyncLLM(FrontEnd):
    """Serves many concurrent requests; may be used from several event loops.

    An engine whose device fails step after step, or hangs, or whose loop breaks, is given up: open
    requests end with an ``ExecutionError``, new ones are refused, and ``unhealthy`` and ``closed``
    say why. In a process that was forked after the engine was loaded, ``closed`` says so.

    ``options`` are the fields of ``RuntimeConfig``, which documents them and their defaults.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:  # noqa: ANN401 - fields differ
        # Imported here because it pulls in the libraries of the engine's device.
        from slipstream.runtime.loading import load

        self._open(load(model, options))

    @classmethod
    def from_engine(
        cls, engine: LoadedEngine, *, clock: Callable[[], float] = time.monotonic
    ) -> Self:
        """Take over an engine that is loaded already; ``clock`` tells seconds."""
        llm = cls.__new__(cls)
        llm._open(engine, clock)
        return llm

    def _open(self, engine: LoadedEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self._prepare(engine, RequestFactory(engine))
        self._loop = EngineLoop(engine, clock=clock, streams=True)
        self._streams: dict[str, _Stream] = {}
        self._thread = EngineThread(self._loop, self._step, self._end, self.config.step_timeout)
        self._thread.start()
        if engine.pooling is None:  # what pools writes nothing that could be held to a form
            self._factory.grammars.prepare_aside()

    @property
    def stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        return self._loop.stats

    async def fetch_stats(self) -> EngineStats:
        """The same, as every ``EngineClient`` gives it."""
        return self._loop.stats

    @property
    def staging(self) -> Staging | None:
        """Through which prompts are handed over, where ``kv_transfer_gib`` says so: for an
        ``Exchange``."""
        return self._loop.staging

    @property
    def closed(self) -> str | None:
        """Why no request is taken any more; None while they are."""
        return self._thread.closed

    @property
    def unhealthy(self) -> str | None:
        """Why the engine was given up, for good; None while it works."""
        return self._thread.unhealthy

    def check_health(self) -> bool:
        """Whether the device works; if it is to be given up, end all requests and refuse new ones.
        Safe from any thread."""
        return self._thread.check_health()

    async def abort(self, request_id: str) -> None:
        """End a request within one step; its iterator ends with ``finish_reason`` ``"abort"``."""
        self._abort(request_id)

    def shutdown(self) -> None:
        """Abort what is running, stop the thread and free the device; one that hangs is left."""
        if self._loop.forked:
            return  # the engine is the other process's
        self.stop_rendering()
        self._thread.shutdown()
        self.workers.shutdown()

    async def _compile(self, form: StructuredOutput) -> None:
        await self.workers.compile(self._factory.grammars.compile, form)

    def _validate(self, request: Request) -> None:
        self._loop.validate(request)

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """What the engine tells of a request, which is aborted where nobody hears it any more."""
        stream = self._submit(request)
        finished = False
        try:
            while not finished:
                event = await stream.get()
                finished = isinstance(event, SlipstreamError) or event.finished
                if isinstance(event, SlipstreamError):
                    raise event
                yield event
        finally:
            if not finished:
                self._abort(request.request_id)

    def _submit(self, request: Request) -> _Stream:
        stream = _Stream(asyncio.get_running_loop())
        if self._streams.setdefault(request.request_id, stream) is not stream:
            raise id_in_use(request.request_id)
        try:  # after the stream is there: whoever closes now ends it
            self._refuse_if_closed()
        except ExecutionError:
            self._streams.pop(request.request_id, None)
            raise
        if request.handover is not None:
            request.handover.submitted = True
        self._thread.put(lambda: self._add(request))
        return stream

    def _add(self, request: Request) -> None:
        try:
            self._loop.add_request(request)
        except SlipstreamError as error:
            if request.handover is not None:
                request.handover.give_up()
            stream = self._streams.pop(request.request_id, None)
            if stream is not None:
                self._wake(stream.event_loop, [(stream, error)])

    def _abort(self, request_id: str) -> None:
        self._thread.put(lambda: self._loop.abort(request_id))

    def _step(self) -> None:
        self._deliver(self._loop.step())

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand outputs to their event loops, waking each of them once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Event]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # it was ended when the engine was given up
                continue
            if output.finished:
                self._streams.pop(output.request_id, None)
            event = output if output.error is None else output.error
            by_loop.setdefault(stream.event_loop, []).append((stream, event))
        for event_loop, events in by_loop.items():
            self._wake(event_loop, events)

    def _wake(
        self, event_loop: asyncio.AbstractEventLoop, events: list[tuple[_Stream, _Event]]
    ) -> None:
        try:
            event_loop.call_soon_threadsafe(_put, events)
        except RuntimeError:  # the event loop was closed while its requests ran
            for _, event in events:
                if isinstance(event, RequestOutput):
                    self._loop.abort(event.request_id)

    def _end(self, reason: str) -> None:
        """End the open requests with an ``ExecutionError``."""
        for request_id in list(self._streams):
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                self._wake(stream.event_loop, [(stream, ExecutionError(reason))])


def _put(events: list[tuple[_Stream, _Event]]) -> None:
    for stream, event in events:
        stream.put(event)
