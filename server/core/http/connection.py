"""A connection with bounds: what comes before a body, how long to wait for a client, how many."""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from slipstream.server.core.http.middleware import set_direct_send
from slipstream.server.core.logs import log_event

_LOG = logging.getLogger(__name__)
_BEGINNING = b"HTTP/1.1 "
_UPGRADE = re.compile(rb"\r\nupgrade:(?=[ \t]*h2c)", re.IGNORECASE)
_FIRST_PAUSE = 0.002  # seconds between two bytes of it; each is four times as long as the last

MAX_HEAD = 1 << 16  # bytes of a request line and headers
REQUEST_SECONDS = 30.0  # for a request line and headers to come, and between pieces of a body
READ_SECONDS = 60.0  # for a client to read what was sent
MAX_CONNECTIONS = 8192
_LOG_SECONDS = 10.0  # between two lines about the same
# Of files that a process may have open, those that are not connections.
_RESERVED = 128


def connection_limit() -> int:
    """How many connections this process can hold, once it may open as many files as it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _RESERVED
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    files = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    return files - min(_RESERVED, files // 4)


@dataclass(slots=True)
class Bounds:
    """What the connections of a server share: how many there may be, and when what was logged."""

    max_connections: int
    told: dict[str, float] = field(default_factory=dict)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which is refused or ended before it can hold others up.

    Where there are too many, the one that has been idle for longest makes room. A client that has
    closed its side still gets its answer: whether it waits or is gone, only bytes to it can tell,
    and since every answer begins with the same ones, those are sent ahead.
    """

    def __init__(self, *arguments: Any, bounds: Bounds, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        self._bounds = bounds
        self._heard = self.loop.time()
        self._received = self._body = 0  # bytes of this request
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, or make room, or refuse."""
        super().connection_made(transport)
        self._wait(self._no_request)
        if len(self.connections) > self._bounds.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take bytes, as long as there are not too many before a body."""
        self._heard = self.loop.time()
        if not self._received and b"h2c" in data:
            data = _without_upgrade(data)
        self._received += len(data)
        super().data_received(data)
        # A chunk of a body has a frame, of some bytes even where it has one byte.
        if self._received - self._body > MAX_HEAD + 8 * self._body:
            self._refuse(431, "Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        if self._timer is None:  # not the first of its connection
            self._wait(self._no_request)

    def on_headers_complete(self) -> None:
        """The last byte before a body."""
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            set_direct_send(cast(Scope, self.scope), cast(Send, self.cycle.send))
        self._wait(self._no_body)

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        super().on_message_complete()
        self._received = self._body = 0
        self._stop_waiting()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Hear that nothing more comes; false closes the connection."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            return False
        cycle.keep_alive = False
        if not cycle.response_started and not self.pipeline:
            cycle.transport = begun = _BegunAnswer(self.transport)  # type: ignore[assignment]
            self._probe(begun, _FIRST_PAUSE)
        return True

    def _probe(self, answer: _BegunAnswer, pause: float) -> None:
        if answer.send_ahead():
            self.loop.call_later(pause, self._probe, answer, 4 * pause)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._reader = self.loop.call_later(READ_SECONDS, self._not_read)

    def resume_writing(self) -> None:
        """The client reads."""
        if self._reader is not None:
            self._reader.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        if self._reader is not None:
            self._reader.cancel()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _ending(self) -> bool:
        return self.transport.is_closing()

    def _make_room(self) -> None:
        others = [
            each
            for each in self.connections
            if isinstance(each, Connection) and each is not self and not each._ending
        ]
        idle = min((each for each in others if each.idle), key=lambda c: c._heard, default=None)
        self._tell("connections_full", {"connections": len(others), "idle": idle is not None})
        if idle is None:
            self._refuse(503, "Service Unavailable")
        else:
            idle.transport.abort()

    def _wait(self, late: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(REQUEST_SECONDS, late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _no_request(self) -> None:
        self._tell("request_timed_out", {})
        self._refuse(408, "Request Timeout")

    def _no_body(self) -> None:
        silent = self.loop.time() - self._heard
        if self.flow.read_paused or silent < REQUEST_SECONDS:
            self._timer = self.loop.call_later(REQUEST_SECONDS, self._no_body)
        else:
            self._no_request()

    def _not_read(self) -> None:
        self._tell("answer_not_read", {})
        self.transport.abort()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer in the name of no API, because there is no request that names one, and close."""
        if self._ending:
            return
        if self.idle or not self.cycle.response_started:
            self.transport.write(
                f"HTTP/1.1 {status} {reason}\r\n"
                "content-length: 0\r\nconnection: close\r\n\r\n".encode()
            )
        self.transport.close()

    def _tell(self, event: str, fields: dict[str, object]) -> None:
        """Write a log line, but not one for each of thousands of connections."""
        told, now = self._bounds.told, self.loop.time()
        if now - told.get(event, -_LOG_SECONDS) >= _LOG_SECONDS:
            told[event] = now
            client = self.client and self.client[0]
            log_event(_LOG, event, {"client": client, **fields}, logging.WARNING)


def _without_upgrade(data: bytes) -> bytes:
    """The beginning of a request that does not ask for HTTP/2, which a server may leave aside and
    Java's clients ask for with every first request: the parser would not read its body."""
    head, blank, body = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + blank + body


class _BegunAnswer:
    """What uvicorn uses of a transport, where the beginning of the answer may have been sent."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0  # bytes ahead of the answer
        self._answered = False
        self.is_closing = transport.is_closing
        self.close = transport.close

    def send_ahead(self) -> bool:
        """Write another byte, unless all are written, or the answer is."""
        if self._answered or self._sent == len(_BEGINNING) or self.is_closing():
            return False
        self._transport.write(_BEGINNING[self._sent : self._sent + 1])
        self._sent += 1
        return True

    def write(self, data: bytes) -> None:
        """Write the answer, or a part of it, without what was sent ahead."""
        if not self._answered:
            data = data[self._sent :]
        self._answered = True
        self._transport.write(data)
