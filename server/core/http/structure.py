"""How much there is in a JSON body, told while it comes and before anything is made of it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.core.limits import MAX_KEYS, MAX_VALUES
from slipstream.server.core.refusal import Refusal


class JsonSize:
    """Counts what stands outside of strings, chunk by chunk.

    ``values`` are elements and fields but the first of each list and object, ``keys`` are lists,
    objects and fields.
    """

    __slots__ = ("_held", "_inside", "keys", "values")

    def __init__(self) -> None:
        self.values = self.keys = 0
        self._inside = False  # of a string
        self._held = b""  # an escape that is cut in two

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        text = (self._held + chunk).replace(rb"\\", b"").replace(rb"\"", b"")
        self._held = b"\\" if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").split(b'"')
        outside = b"".join(parts[self._inside :: 2])
        self._inside ^= len(parts) % 2 == 0
        self.values += outside.count(b",")
        self.keys += sum(map(outside.count, (b"[", b"{", b":")))


class StructureLimit:
    """Refuses bodies of more values than any request needs: parsing and checking millions of them
    holds up everybody else."""

    def __init__(self, app: ASGIApp, max_values: int = MAX_VALUES) -> None:
        self._app = app
        self._max_values = max_values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count on the way."""
        size = JsonSize()

        async def counted() -> Message:
            message = await receive()
            size.feed(message.get("body", b""))
            if size.values > self._max_values or size.keys > MAX_KEYS:
                raise Refusal(
                    "invalid",
                    f"the body holds more than {self._max_values} values, or more than {MAX_KEYS} "
                    "lists, objects and fields; send less in one request",
                )
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
