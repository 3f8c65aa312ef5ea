"""What the server writes into its log, and what it does not."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from tests.server.openai.serving import Running, serving

from slipstream.server.core.logs import structured_logs

SECRET = "attack at dawn"


@contextmanager
def logged(**options: Any) -> Iterator[tuple[Running, list[dict[str, Any]]]]:  # noqa: ANN401
    """A server and, after its end, its log."""
    stream = io.StringIO()
    lines: list[dict[str, Any]] = []
    with structured_logs("json", stream), serving(**options) as running:
        yield running, lines
    lines += map(json.loads, stream.getvalue().splitlines())


def ask(running: Running) -> None:
    """A request of every kind, good and bad, with a secret in each."""
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    text = {"prompt": SECRET, "max_tokens": 2}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/completions", text),
        ("/v1/completions", {**text, "stream": True}),
        ("/v1/completions", {"prompt": [SECRET, 1]}),
        ("/v1/completions", {"prompt": SECRET * 100}),
        ("/v1/completions", {"prompt": SECRET, "stop": ["", SECRET]}),
        ("/v1/chat/completions", {"messages": [{"role": 1, "content": SECRET}]}),
        ("/tokenize", {"prompt": SECRET}),
    ):
        running.post(path, body, headers={"X-Request-Id": "mine"})


def test_a_line_a_request_without_prompts() -> None:
    with logged() as (running, lines):
        ask(running)
        httpx.get(f"{running.url}/health", timeout=60)
    assert lines[0]["message"] == "serving" and lines[0]["model"] == "counting"
    requests = [line for line in lines if line["message"] == "request"]
    assert len(requests) == 9, "probes that succeed are left out"
    assert {line["request_id"] for line in requests} == {"mine"}
    assert [line["status"] for line in requests] == [200] * 4 + [400] * 4 + [200]
    for line in requests[:4]:
        assert line["prompt_tokens"] > 0 and line["completion_tokens"] == 2
        assert line["method"] == "POST" and line["seconds"] >= 0
    assert SECRET not in json.dumps(lines)


def test_prompts_are_written_when_asked_for() -> None:
    with logged(log_prompts=True) as (running, lines):
        ask(running)
    prompts = [line for line in lines if line["message"] == "prompts"]
    assert prompts and all(SECRET in json.dumps(line["prompts"]) for line in prompts)
    assert all("max_tokens" in line["params"] for line in prompts)


def test_a_client_that_leaves_is_told_in_the_log() -> None:
    body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}
    with logged(engine=None) as (running, lines):
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as stream:
            next(stream.iter_lines())
        running.wait_idle()
    (line,) = [line for line in lines if line["message"] == "request"]
    assert line["status"] == 200 and line["client_gone"] is True


@pytest.mark.parametrize("name", ["\x1b[31m", "é", "a b"])
def test_a_request_id_cannot_forge_a_line(name: str) -> None:
    with logged() as (running, lines):
        request = (
            b"GET /nothing%0aINFO HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"X-Request-Id: " + name.encode() + b"\r\n\r\n"
        )
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(request)
            answer = connection.recv(1 << 16)
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    ids = [line["request_id"] for line in lines if line["message"] == "request"]
    assert all(re.fullmatch(r"[0-9a-f]{32}", given) for given in ids)
