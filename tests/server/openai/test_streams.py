"""Clients that leave, and engines that fail, with streams open."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import openai
import pytest
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, check_aborted, serving

from slipstream.runtime.testing import counting_engine

ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}


@pytest.mark.parametrize("body", [{}, {"prompt": ["a", "b", "c"]}, {"n": 3}])
def test_a_stream_that_is_left_is_aborted(body: dict[str, Any]) -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as running, device:
        device.permits.release()
        request = {**ENDLESS, **body, "stream": True}
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=request, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            for _ in range(3):
                assert any(line.startswith("data: ") for line in lines)
                device.permits.release()
        check_aborted(running, device)


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_an_answer_nobody_waits_for_is_aborted(path: str, extra: dict[str, Any]) -> None:
    body = json.dumps({"max_tokens": 200, "ignore_eos": True, **extra}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    device = GatedDevice()
    with serving(engine_on(device)) as running, device:
        port = int(running.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert device.waiting.wait(60)
        check_aborted(running, device)


def test_clients_that_leave_at_any_moment_leave_nothing() -> None:
    async def visit(client: httpx.AsyncClient, url: str, number: int) -> None:
        body = {**ENDLESS, "stream": bool(number % 2), "n": 1 + number % 2}
        try:
            async with asyncio.timeout(0.002 * (number % 25)):
                await client.post(url, json=body)
        except TimeoutError:
            return

    async def crowd(url: str) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(visit(client, url, number) for number in range(100)))

    with serving(counting_engine(24, delay=0.001, max_batch_size=6)) as running:
        asyncio.run(crowd(f"{running.url}/v1/completions"))
        running.wait_idle()


def test_a_device_that_fails_in_a_stream_is_told_in_the_stream() -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as running, device:
        device.permits.release()
        client = running.client()
        stream = client.completions.create(
            model="counting",
            prompt="a",
            max_tokens=250,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        assert next(stream).choices[0].text == "b"
        device.fail_next = True
        device.permits.release(1000)
        with pytest.raises(openai.APIError, match="a step failed on the device"):
            list(stream)
        device.fail_next = True
        response = running.post("/v1/completions", {"prompt": "a", "stream": True})
        assert response.status_code == 503, "nothing was sent yet, so there is a status"
        assert response.json()["error"]["type"] == "service_unavailable_error"
        assert client.completions.create(model="counting", prompt="a", max_tokens=1)
        samples = running.samples()
        assert samples["slipstream:request_success_total error"] == 2


def test_an_error_event_is_the_last_of_a_stream() -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as running, device:
        device.permits.release()
        body = {**ENDLESS, "stream": True}
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=body, timeout=60
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            device.fail_next = True
            device.permits.release(1000)
            rest = [line for line in lines if line]
    assert rest[-1].startswith('data: {"error": {"message": "a step failed')
    assert not any("[DONE]" in line for line in rest)


def test_a_dead_engine_is_503_and_unhealthy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as running:

        def broken() -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(running.llm._loop, "step", broken)
        response = running.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 503
        assert "the engine loop stopped" in response.json()["error"]["message"]
        assert running.llm.unhealthy is not None and "stopped" in running.llm.unhealthy
        monkeypatch.undo()
        running.llm._loop.abort(next(iter(running.llm._loop._requests)))
    assert "the engine loop stopped" in caplog.text


def test_a_bug_is_500_with_the_request_id(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str | None) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(server.service, "model", broken)
    response = server.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "x7"})
    assert response.status_code == 500 and response.headers["x-request-id"] == "x7"
    assert response.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text and "ZeroDivisionError" not in response.text
