"""The thread that talks to Triton: it sends responses, and asks whether clients have gone.

Both are calls to another process, 0.1 ms and 0.01 ms long, which no step of the engine should wait
for. One thread makes them all, so nothing is asked of a request that has had its last response.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Protocol

from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.request import RequestOutput
from slipstream.server.triton.answers import Answer, Outputs

_LOG = logging.getLogger(__name__)
# A request that is streamed is asked about whenever it has a token; this is how often the others
# are: those that wait in the queue, and those that are answered in one piece.
_POLL_SECONDS = 0.02
_PUBLISH_SECONDS = 0.25


class Reply(Protocol):
    """The way back to one client."""

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response; nothing follows a final one."""
        ...

    def fail(self, error: SlipstreamError) -> None:
        """End with an error."""
        ...

    def is_cancelled(self) -> bool:
        """Whether Triton knows that nobody waits for the answer."""
        ...


@dataclass(slots=True, eq=False)
class Call:
    """A request in flight: what is still to be told of it, in order, and how to end it."""

    reply: Reply
    answer: Answer
    cancel: Callable[[], None]
    news: deque[RequestOutput | SlipstreamError] = field(default_factory=deque)
    cancelled: bool = False
    closed: bool = False

    def take(self) -> tuple[list[RequestOutput], SlipstreamError | None]:
        """What has come since the last time; an error is the last that comes."""
        steps: list[RequestOutput] = []
        while self.news:
            news = self.news.popleft()
            if isinstance(news, SlipstreamError):
                return steps, news
            steps.append(news)
        return steps, None


class Outbox:
    """Sends what is put in; steps of a request that pile up are sent as one response."""

    def __init__(self, publish: Callable[[], None]) -> None:
        """``publish`` is called a few times a second, to tell Triton what metrics have become."""
        self._publish = publish
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._open: set[Call] = set()
        self._thread = threading.Thread(target=self._run, name="slipstream-outbox", daemon=True)
        self._thread.start()

    def open(self, call: Call) -> None:
        """Watch whether the client of a new request goes; before its first ``put``."""
        self._queue.put(call)

    def put(self, call: Call, news: RequestOutput | SlipstreamError) -> None:
        """Tell the client."""
        call.news.append(news)
        self._queue.put(call)

    def close(self) -> None:
        """Send what was put in, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        polled = published = time.monotonic()
        while True:
            try:
                call = self._queue.get(timeout=_POLL_SECONDS if self._open else _PUBLISH_SECONDS)
            except Empty:
                pass
            else:
                if call is None:
                    break
                self._guarded(call, self._tell)
            now = time.monotonic()
            if now - polled >= _POLL_SECONDS:
                polled = now
                for call in list(self._open):
                    self._guarded(call, self._ask)
            if now - published >= _PUBLISH_SECONDS:
                published = now
                self._publish_metrics()
        self._publish_metrics()

    def _publish_metrics(self) -> None:
        try:
            self._publish()
        except Exception:  # noqa: BLE001 - requests go on without metrics
            _LOG.exception("metrics could not be published")

    def _guarded(self, call: Call, action: Callable[[Call], None]) -> None:
        """A request whose client cannot be talked to ends; the others go on."""
        try:
            if not call.closed:
                action(call)
        except Exception as error:  # noqa: BLE001 - whatever Triton raises ends this request only
            _LOG.exception("a response could not be sent")
            self._close(call)
            call.cancel()
            with suppress(Exception):
                call.reply.fail(ExecutionError(f"the response could not be sent: {error!r}"))

    def _tell(self, call: Call) -> None:
        self._open.add(call)
        steps, error = call.take()
        finished = bool(steps) and steps[-1].finished
        if steps and not finished and error is None:
            self._ask(call)
        if finished or (steps and not call.cancelled):
            call.reply.send(call.answer.tensors(steps), final=finished)
        if error is not None:
            call.reply.fail(error)
        if finished or error is not None:
            self._close(call)

    def _ask(self, call: Call) -> None:
        if not call.cancelled and call.reply.is_cancelled():
            call.cancelled = True
            call.cancel()

    def _close(self, call: Call) -> None:
        call.closed = True
        self._open.discard(call)
