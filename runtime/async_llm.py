"""The engine in a background thread, for asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ParamSpec, Self, TypeVar

from slipstream.errors import ExecutionError, InvalidRequestError, SlipstreamError
from slipstream.runtime.async_pooling import AsyncPooling
from slipstream.runtime.chat.composer import Composed, Composer
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import OutputKind, Request, RequestOutput
from slipstream.runtime.request_factory import Message, Prompt, RequestFactory
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_Event = RequestOutput | SlipstreamError
_NO_RENDERING = "the engine is being shut down and begins no conversation; load it again to go on"
_PATIENCE = 5.0  # seconds between two looks at a device that may hang


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


class AsyncLLM(AsyncPooling):
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
        self.tokenizer = engine.tokenizer
        self.config = engine.config
        self.generation_defaults = engine.generation_defaults
        self.workers = Workers()
        self.fingerprint = engine.fingerprint
        self.engine = engine.engine
        self.pooling = engine.pooling
        self.interactive_defaults = engine.interactive_defaults
        self._factory = RequestFactory(engine)
        self._loop = EngineLoop(engine, clock=clock)
        self._streams: dict[str, _Stream] = {}
        self._templates = ThreadPoolExecutor(1, "slipstream-template")
        self._renders = True
        self._stopped = threading.Event()
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closed: str | None = None
        self._broken: str | None = None  # what ended the engine's thread
        self._thread = threading.Thread(target=self._serve, name="slipstream-engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="slipstream-watch", daemon=True).start()
        if engine.pooling is None:  # what pools writes nothing that could be held to a form
            # It keeps the interpreter for a while, so not when others wait for their tokens.
            prepare = self._factory.grammars.prepare
            threading.Thread(target=prepare, name="slipstream-grammars", daemon=True).start()

    @property
    def stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        return self._loop.stats

    @property
    def closed(self) -> str | None:
        """Why no request is taken any more; None while they are."""
        return self._closed or self._loop.forked

    @property
    def unhealthy(self) -> str | None:
        """Why the engine was given up, for good; None while it works."""
        return self._broken or self._loop.unhealthy

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        output_kind: OutputKind = "cumulative",
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt (a text or token ids), yielding after every token.

        Cached prompts are shared with those of equal ``cache_salt`` only. A consumer that is
        cancelled or closes the iterator aborts the request. Raises ``InvalidRequestError`` or
        ``CapacityError`` for a request that cannot run, and ``ExecutionError`` if the device fails;
        other requests go on.
        """
        self._refuse_if_closed()
        if sampling_params is not None and sampling_params.structured is not None:
            await self.workers.compile(self._factory.grammars.compile, sampling_params.structured)
        # A long text takes milliseconds to encode; the event loop must not wait for it.
        request = await self.workers.run(
            len(prompt) if isinstance(prompt, Sized) else 0,  # what else it is, is told there
            self._request,
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            output_kind=output_kind,
            cache_salt=cache_salt,
        )
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

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

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        **options: Any,  # noqa: ANN401 - fields of ChatOptions, and templates define their own
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation (a list of ``{"role": ..., "content": ...}``); see ``generate``.

        ``options`` are fields of ``ChatOptions``, such as ``tools`` and ``thinking``, and variables
        of the template. Each completion's ``turn`` has its thoughts, text and calls so far.
        """
        made = await self.compose(
            self._factory.composer,
            Conversation.of(messages, options),
            sampling_params or self.generation_defaults,
        )
        turns = made.output_turns(output_kind)
        outputs = self.generate(made.tokens, made.params, request_id, output_kind=output_kind)
        async with aclosing(outputs):
            async for output in outputs:
                turns.add(output)
                yield output

    async def compose(
        self,
        composer: Composer,
        conversation: Conversation,
        params: SamplingParams,
        add_special_tokens: bool = False,
    ) -> Composed:
        """What ``composer`` makes of a conversation, in threads; raises what that raises."""
        text = await self.render(composer.render, conversation)
        return await self.workers.run(
            len(text), composer.hold, conversation, text, params, add_special_tokens
        )

    async def render(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what renders a chat template, in a thread that nothing else waits for: a template
        may take as long as it is allowed to. Raises what the call raises."""
        if not self._renders:
            raise ExecutionError(_NO_RENDERING)
        rendering = self._templates.submit(partial(function, *args, **kwargs))
        try:
            return await asyncio.wrap_future(rendering)
        except asyncio.CancelledError:
            if self._renders:
                raise
            raise ExecutionError(_NO_RENDERING) from None

    def stop_rendering(self) -> None:
        """Refuse to render chat templates, also for those that wait for it."""
        self._renders = False
        self._templates.shutdown(wait=False, cancel_futures=True)

    async def abort(self, request_id: str) -> None:
        """End a request within one step; its iterator ends with ``finish_reason`` ``"abort"``."""
        self._abort(request_id)

    def shutdown(self) -> None:
        """Abort what is running, stop the thread and free the device; one that hangs is left."""
        if self._loop.forked:
            return  # the engine is the other process's
        self.stop_rendering()
        self._commands.put(None)
        # A device that hangs is noticed while the engine's thread waits for it.
        while self._thread.is_alive() and not self.unhealthy:
            self._thread.join(_PATIENCE)
        self._thread.join(_PATIENCE)
        self._stopped.set()
        self.workers.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def _request(self, prompt: Prompt, *arguments: Any, **options: Any) -> Request:  # noqa: ANN401
        """A request that the engine can run."""
        request = self._factory.request(prompt, *arguments, **options)
        self._loop.validate(request)
        return request

    def _submit(self, request: Request) -> _Stream:
        stream = _Stream(asyncio.get_running_loop())
        if self._streams.setdefault(request.request_id, stream) is not stream:
            raise InvalidRequestError(
                f"request id {request.request_id!r:.80} is in use; give every request its own"
            )
        try:  # after the stream is there: whoever closes now ends it
            self._refuse_if_closed()
        except ExecutionError:
            self._streams.pop(request.request_id, None)
            raise
        self._commands.put(lambda: self._add(request))
        return stream

    def _refuse_if_closed(self) -> None:
        if (reason := self.closed) is not None:
            raise ExecutionError(reason)

    def _add(self, request: Request) -> None:
        try:
            self._loop.add_request(request)
        except SlipstreamError as error:
            stream = self._streams.pop(request.request_id, None)
            if stream is not None:
                self._wake(stream.event_loop, [(stream, error)])

    def _abort(self, request_id: str) -> None:
        self._commands.put(lambda: self._loop.abort(request_id))

    def _serve(self) -> None:
        """The engine thread: take commands, run a step, pass on what it changed."""
        try:
            while self._take_commands():
                self._deliver(self._loop.step())
                if not self.check_health():
                    return
            self._close("the engine was shut down; load it again to go on")
        # The last resort: nobody may wait for ever. A panic in a Rust library is no Exception.
        except BaseException as error:  # noqa: BLE001
            _LOG.exception("the engine loop stopped")
            self._broken = f"the engine loop stopped: {error!r}. Load the engine again to go on"
            self._close(self._broken)
        finally:
            self._free()

    def _free(self) -> None:
        try:
            self._loop.shutdown()
        except Exception:  # noqa: BLE001 - a broken device; everybody has been told
            _LOG.exception("the device could not be freed")

    def check_health(self) -> bool:
        """Whether the device works; if it is to be given up, end all requests and refuse new ones.
        Safe from any thread."""
        reason = self.unhealthy
        if reason is not None and self._closed is None:
            _LOG.error("the engine is given up: %s", reason)
            self._close(reason)
        return reason is None

    def _watch(self) -> None:
        """Look after a device that may hang, from a thread that does not wait for it."""
        while not self._stopped.wait(min(_PATIENCE, self.config.step_timeout / 4)):
            self.check_health()

    def _take_commands(self) -> bool:
        """Run what callers asked for, waiting if there is nothing else to do; False: stop."""
        while not (self._commands.empty() and self._loop.has_work):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

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

    def _close(self, reason: str) -> None:
        """Refuse new requests and end the open ones with an ``ExecutionError``."""
        if self._closed is None:
            self._closed = reason
        for request_id in list(self._streams):
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                self._wake(stream.event_loop, [(stream, ExecutionError(self._closed))])


def _put(events: list[tuple[_Stream, _Event]]) -> None:
    for stream, event in events:
        stream.put(event)
