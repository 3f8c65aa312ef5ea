"""Devices that fail or hang, and rows that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from starlette.testclient import TestClient
from tests.server.devices import BrokenDevice, Clock, GatedDevice, engine_on
from tests.server.openai.serving import Running, samples_of, serving

from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.health import MAX_FAILURES
from slipstream.runtime.testing import ALPHABET
from slipstream.server.core.http.app import Counting, create_app
from slipstream.server.core.metrics import EngineMetrics
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.service import Service
from slipstream.server.openai.api import OPENAI

COMPLETIONS = "/v1/completions"
FAILED = f"the device failed {MAX_FAILURES} steps in a row"


@contextmanager
def application(llm: AsyncLLM) -> Iterator[TestClient]:
    """A client of the application alone: there is no server around it that would end."""
    metrics = EngineMetrics("counting", llm)
    service = Service(llm, ServerOptions(served_model_name=("counting",)), metrics)
    with TestClient(create_app(service, Counting(metrics), [OPENAI])) as client:
        yield client
    llm.shutdown()


def healthy(metrics: str) -> float:
    return samples_of(metrics)["slipstream:engine_healthy"]


def test_an_unhealthy_engine_is_503_everywhere() -> None:
    with application(AsyncLLM.from_engine(engine_on(BrokenDevice()))) as client:
        for _ in range(MAX_FAILURES):
            assert client.get("/health").status_code == 200
            assert healthy(client.get("/metrics").text) == 1
            answer = client.post(COMPLETIONS, json={"prompt": "a"})
            assert answer.status_code == 503
            assert "told to fail this step" in answer.json()["error"]["message"]
        for answer in (client.get("/health"), client.post(COMPLETIONS, json={"prompt": "a"})):
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "service_unavailable_error"
            assert answer.json()["error"]["message"].startswith(FAILED)
        assert healthy(client.get("/metrics").text) == 0


def test_a_device_that_fails_step_after_step_ends_the_server() -> None:
    with serving(engine_on(BrokenDevice())) as running:
        for _ in range(MAX_FAILURES):
            assert running.post(COMPLETIONS, {"prompt": "a"}).status_code == 503
        must_end(running)


def test_a_device_that_hangs_ends_its_requests_and_the_server() -> None:
    device, clock = GatedDevice(), Clock()
    request = {"prompt": "a", "max_tokens": 1}
    with (
        serving(engine_on(device), clock=clock) as running,
        device,
        ThreadPoolExecutor() as clients,
    ):
        answer = clients.submit(running.post, COMPLETIONS, request)
        assert device.waiting.wait(60)
        assert httpx.get(f"{running.url}/health").status_code == 200
        clock.now = running.llm.config.step_timeout + 1
        error = answer.result(10).json()["error"]
        assert answer.result().status_code == 503
        assert "the device has not answered for 601 seconds" in error["message"]
        must_end(running)
        assert device.steps == 1


def text_of(events: Sequence[str]) -> str:
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    return "".join(choice["text"] for choice in choices)


def must_end(running: Running) -> None:
    running.thread.join(10)
    assert not running.thread.is_alive(), "the server did not end by itself"


@pytest.mark.parametrize(
    ("prompt", "stream", "sent"), [("x", False, ""), ("y", True, ""), ("x", True, "y")]
)
def test_a_row_that_fails_ends_its_request_alone(prompt: str, stream: bool, sent: str) -> None:
    device = GatedDevice()
    device.broken_token = ALPHABET.index("z")
    neighbour = {"prompt": "A", "max_tokens": 30, "stream": True}
    with serving(engine_on(device)) as running, device, ThreadPoolExecutor() as clients:
        device.permits.release()
        with httpx.stream("POST", running.url + COMPLETIONS, json=neighbour) as response:
            events = response.iter_lines()
            first = next(events)
            # The device is at the neighbour's second step: the two share those that follow.
            request = {"prompt": prompt, "stream": stream}
            broken = clients.submit(running.post, COMPLETIONS, request)
            running.wait(lambda: len(running.llm._streams) == 2)
            device.permits.release(100)
            rest = [line for line in events if line]
        assert rest.pop() == "data: [DONE]"
        assert text_of([first, *rest]) == "BCDEFGHIJKLMNOPQRSTUVWXYZ01234"
        assert '"finish_reason":"length"' in rest[-1]
        answer = broken.result(10)
        assert answer.status_code == (200 if sent else 503)
        *chunks, error = [line for line in answer.text.splitlines() if line]
        assert text_of(chunks) == sent
        assert json.loads(error.removeprefix("data: "))["error"] == {
            "message": "the counting executor broke this token",
            "type": "service_unavailable_error",
            "param": None,
            "code": None,
        }
        assert httpx.get(f"{running.url}/health").status_code == 200
        samples = running.samples()
        assert samples["slipstream:request_success_total error"] == 1
        assert samples["slipstream:request_success_total length"] == 1
