"""What happens around every request: its id, its log line, its host, its key and its size.

Plain ASGI, because a stream passes through here chunk by chunk.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.core.logs import log_event, request_id
from slipstream.server.core.refusal import Refusal, internal_refusal

# Renders a refusal for whoever sent a request.
Refuse = Callable[[Scope, Refusal], Response]
# Hears of every answer: the method, the path of the route (None: there is none) and the status.
Count = Callable[[str, str | None, int], None]
_LOG = logging.getLogger(__name__)
_FIELDS = "slipstream.log_fields"
_SEND = "slipstream.send"
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_LINGER_SECONDS = 30  # for the rest of a body whose request has been answered
# Of these nobody needs a key: they are asked by machines, and tell nothing of anybody's requests.
OPEN_PATHS = frozenset(
    {"/", "/health", "/ping", "/load", "/metrics", "/version", "/openapi.json"}
    | {f"/page/{name}" for name in ("page.css", "chat.js", "markdown.js")}
)


def log_fields(scope: Scope) -> dict[str, Any]:
    """What a handler adds to the log line of its request."""
    return cast(dict[str, Any], scope.setdefault(_FIELDS, {}))


def set_direct_send(scope: Scope, send: Send) -> None:
    """Note the server's own ``send``, where it is not what the application is called with."""
    scope[_SEND] = send


def direct_send(scope: Scope) -> Send:
    """The server's own ``send``, for what follows the start of a stream: no middleware looks at
    it, and each costs time for every token."""
    return cast(Send, scope[_SEND])


class RequestLog:
    """Gives every request an id (``X-Request-Id``, the client's own if it sent one) and one log
    line, counts it, and answers 500 to a bug."""

    def __init__(self, app: ASGIApp, refuse: Refuse, count: Count) -> None:
        self._app = app
        self._refuse = refuse
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        started, status = time.monotonic(), 0
        scope.setdefault(_SEND, send)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        token = request_id.set(name)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # a bug: whoever asked must hear of it, and the log why
            _LOG.exception("a request failed")
            if status:
                raise
            await self._refuse(scope, internal_refusal())(scope, receive, send_with_id)
        finally:
            _log(scope, status, time.monotonic() - started)
            if status:
                self._count(scope["method"], getattr(scope.get("route"), "path", None), status)
            request_id.reset(token)


def _log(scope: Scope, status: int, seconds: float) -> None:
    client = scope.get("client")
    fields = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
        "client": client and f"{client[0]}:{client[1]}",
    }
    # Probes come every few seconds.
    level = logging.DEBUG if scope["path"] in OPEN_PATHS and status < 400 else logging.INFO
    log_event(_LOG, "request", fields | log_fields(scope), level)


class HostGuard:
    """Lets requests pass that came by a name which is this server's, so that no web page reaches a
    server on a loopback address by a name that it has made to point there (DNS rebinding).

    Addresses, names without a dot and those below ``localhost`` are nobody else's; ``allowed`` are
    further ones, ``*`` all.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], refuse: Refuse) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass on."""
        app = self._app
        if scope["type"] == "http" and "*" not in self._allowed:
            for host in Headers(scope=scope).getlist("host"):
                if not self._knows(host):
                    app = self._refuse(scope, _unknown_host(host))
        await app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name = _PORT.sub("", host.lower()).rstrip(".")
        own = "." not in name or name.endswith(".localhost") or name in self._allowed
        return own or _is_address(name.strip("[]"))


_PORT = re.compile(r":\d*$")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _unknown_host(host: str) -> Refusal:
    return Refusal(
        "forbidden",
        f"this server does not answer to the name {host!r:.100}; ask it by its address, or allow "
        "the name with --allowed-hosts",
        code="unknown_host",
    )


class KeyGuard:
    """Lets requests pass that carry one of the keys, and those that need none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass on."""
        app = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._knows(scope):
            refusal = Refusal(
                "unauthorized",
                "this server wants an API key it knows: send Authorization: Bearer KEY, or "
                "x-api-key: KEY",
                code="invalid_api_key",
            )
            app = self._refuse(scope, refusal)
        await app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        bearer = key if scheme.lower() == "bearer" else ""
        sent = (bearer, headers.get("x-api-key", ""))
        given = [key.strip().encode("latin-1") for key in sent]  # as they came
        # All are compared, each in constant time, so that time tells nothing of a key.
        found = [hmac.compare_digest(key, known) for key in given for known in self._keys]
        return any(found)


class BodyReader:
    """Reads what is left of a body that was not wanted, after the answer and for a while.

    A connection that is closed with a body on its way is reset, and clients that send it all
    before they read, as Python's do, would never see why they were refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with an answer that ends when the body has."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        more = True

        async def noted() -> Message:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def send_and_read(message: Message) -> None:
            if more and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _discard(noted, lambda: more)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(scope, noted, send_and_read)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _discard(receive: Receive, more: Callable[[], bool]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while more():
                await receive()


class HeadAsGet:
    """Answers HEAD wherever GET is answered; the server itself leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        await self._app(as_get, receive, send)
        scope["route"] = as_get.get("route")  # for whoever counts


class BodyLimit:
    """Refuses bodies that are too large, before or while they are read."""

    def __init__(self, app: ASGIApp, max_bytes: int, refuse: Refuse) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            response = self._refuse(scope, Refusal("too_large", self._message()))
            await response(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise HTTPException(413, self._message())  # the one kind that FastAPI passes on
            return message

        await self._app(scope, counted, send)

    def _message(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes; send less in one request"
