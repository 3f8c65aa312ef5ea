"""A connection that still answers a client which has closed its side of it.

Whether such a client waits or is gone cannot be told from what it sends; only bytes to it can,
which one that is gone refuses. Every answer begins with the same bytes, so those are sent ahead.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_BEGINNING = b"HTTP/1.1 "
_FIRST_PAUSE = 0.002  # seconds between two bytes of it; each is four times as long as the last


class Connection(HttpToolsProtocol):
    """One connection; its requests go on until it is closed to both sides."""

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
