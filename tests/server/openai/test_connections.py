"""Connections that send too much, nothing, or come by the hundred, beside one that asks."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from tests.server.devices import Clock, GatedDevice, engine_on
from tests.server.openai.serving import Running, serving

from slipstream.server.core.http import connection, process
from slipstream.server.core.http.connection import Bounds, Connection

BRIEF = {"prompt": "a", "max_tokens": 1}


def connect(running: Running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def answer_of(client: socket.socket) -> bytes:
    """What comes before the other side closes; a reset is an end too."""
    answer = b""
    try:
        while piece := client.recv(1 << 16):
            answer += piece
    except ConnectionError:
        pass
    return answer


def flood(client: socket.socket, begin: bytes, piece: bytes) -> bytes:
    """Send until it is refused, which must come within some megabytes."""
    try:
        client.sendall(begin)
        for _ in range(1000):
            client.sendall(piece * 100)
    except ConnectionError:
        return b""
    else:
        pytest.fail("everything was taken")


FLOODS: dict[str, tuple[bytes, bytes]] = {
    "one header": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: ", b"a" * 1000),
    "headers": (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"A: b\r\n" * 200),
    "a path": (b"GET /", b"a" * 1000),
    "trailers": (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n",
        b"A: b\r\n" * 200,
    ),
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_is_no_body_is_bounded(server: Running, name: str) -> None:
    with connect(server) as client:
        flood(client, *FLOODS[name])
    assert server.post("/v1/completions", BRIEF).status_code == 200


def test_headers_that_are_too_long_are_431(server: Running) -> None:
    with connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (connection.MAX_HEAD + 1))
        assert answer_of(client).startswith(b"HTTP/1.1 431 ")


SILENT = [
    b"",
    b"GET /hea",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    b"GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /",
]


def test_who_does_not_send_is_not_waited_for_and_who_has_sent_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.5)
    device, clock = GatedDevice(), Clock()
    with serving(engine_on(device)) as running, device, ExitStack() as stack:
        loop = running.server.servers[0].get_loop()
        clock.now = loop.time()
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(loop, "time", clock)
        clients = [stack.enter_context(connect(running)) for _ in SILENT]
        for client, sent in zip(clients, SILENT, strict=True):
            client.sendall(sent)
        pool = stack.enter_context(ThreadPoolExecutor())
        answer = pool.submit(running.post, "/v1/completions", BRIEF)
        assert device.waiting.wait(60)
        loop.call_soon_threadsafe(clock.sleep, 1)
        for client in clients:
            assert b"HTTP/1.1 408 " in answer_of(client)
        assert not answer.done()
        device.permits.release()
        assert answer.result().status_code == 200


def test_where_there_are_too_many_the_idle_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "connection_limit", lambda: 4)
    with serving() as running, ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(connect(running))
        for _ in range(3):
            assert running.post("/v1/completions", BRIEF).status_code == 200
            assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
        running.wait(lambda: len(running.server.server_state.connections) <= 4)


def test_files_are_left_for_other_things(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    for soft, hard, most in ((256, 1024, 896), (1 << 20, 1 << 20, 8192), (64, 64, 48)):
        limits = soft, hard
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
        assert connection.connection_limit() == most
    assert given == [(1024, 1024)]


def test_who_does_not_read_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READ_SECONDS", 0.01)

    async def run() -> None:
        config, state, aborted = (
            Mock(limit_concurrency=None),
            Mock(connections=set()),
            asyncio.Event(),
        )
        one = Connection(config, state, {}, bounds=Bounds(9))
        transport = Mock()
        transport.abort = aborted.set
        transport.get_extra_info.return_value = None
        one.connection_made(transport)
        one.pause_writing()
        one.resume_writing()
        one.pause_writing()
        await asyncio.wait_for(aborted.wait(), 60)
        one.connection_lost(None)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["Upgrade", "upgrade", "UPGRADE"])
def test_who_asks_for_http2_is_answered_in_http1(server: Running, name: str) -> None:
    """As Java's client does with its first request; the body must be read all the same."""
    body = json.dumps(BRIEF | {"prompt": "h2c\r\nupgrade: h2c"}).encode()
    with connect(server) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings"
            + f"\r\n{name}: h2c\r\nHTTP2-Settings: AAMAAABk\r\n".encode()
            + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
