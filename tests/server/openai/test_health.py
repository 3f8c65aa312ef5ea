"""An engine whose device does not work any more."""

from __future__ import annotations

import httpx
import pytest
from tests.server.openai.serving import serving

from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.testing import counting_engine

REASON = "the device failed 3 steps in a row"


def test_an_unhealthy_engine_is_503_everywhere_and_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with serving(counting_engine(delay=0.01)) as running:
        assert running.samples()["slipstream:engine_healthy"] == 1
        # A stream that goes on keeps the server from ending while it is asked.
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            monkeypatch.setattr(AsyncLLM, "unhealthy", property(lambda _: REASON))
            health = httpx.get(f"{running.url}/health")
            refused = running.post("/v1/completions", {"prompt": "a"})
            assert running.samples()["slipstream:engine_healthy"] == 0
            assert [line for line in lines if line][-1] == "data: [DONE]"
        for answer in (health, refused):
            assert answer.status_code == 503 and answer.json()["error"]["message"] == REASON
        running.thread.join(10)
        assert not running.thread.is_alive(), "the server did not end by itself"
