"""A real server on a free port of this machine, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from tests.server.devices import GatedDevice

from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.testing import counting_engine
from slipstream.server.anthropic.api import ANTHROPIC
from slipstream.server.core.http.listener import bind, url_of
from slipstream.server.core.http.process import DrainingServer, server_of
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.service import Service
from slipstream.server.ollama.api import OLLAMA
from slipstream.server.openai.api import OPENAI
from slipstream.server.responses.api import RESPONSES


@dataclass(slots=True)
class Running:
    """A server that runs, and clients for it."""

    url: str
    llm: AsyncLLM
    server: DrainingServer
    service: Service
    thread: threading.Thread

    def client(self, **options: Any) -> openai.OpenAI:  # noqa: ANN401 - those of the client
        """OpenAI's own client; it does not repeat what fails."""
        given = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def async_client(self) -> openai.AsyncOpenAI:
        """The same for asyncio."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:  # noqa: ANN401 - JSON
        """A request as it is."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def stats(self) -> EngineStats:
        """What the engine does now."""
        return self.llm.stats

    def samples(self) -> dict[str, float]:
        """Metrics by name and, where it is not that of the model, label."""
        return samples_of(httpx.get(f"{self.url}/metrics", timeout=60).text)

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Return when it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.stats()}"
            time.sleep(0.002)

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until no request and no page is left."""
        self.wait(self._idle, seconds)

    def _idle(self) -> bool:
        stats = self.stats()
        left = (stats.num_running, stats.num_waiting, stats.kv_cache_usage, self.service.places.own)
        return left == (0, 0, 0, 0)


def samples_of(text: str) -> dict[str, float]:
    """The samples of Prometheus' text format."""
    return {
        " ".join([sample.name, *(v for k, v in sample.labels.items() if k != "model_name")]): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def check_aborted(running: Running, device: GatedDevice) -> None:
    """A client that has left is noticed while the device is held, which then does little more."""
    running.wait(lambda: running.samples()["slipstream:request_success_total abort"] >= 1)
    steps = device.steps
    device.permits.release(1000)
    running.wait_idle()
    assert device.steps <= steps + 2


@contextmanager
def serving(
    engine: LoadedEngine | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,  # noqa: ANN401 - those of the server
) -> Iterator[Running]:
    """Serve an engine (None: the counting model); at the end no request may be left.

    ``clock`` is the engine's.
    """
    llm = AsyncLLM.from_engine(engine or counting_engine(), clock=clock)
    settings = ServerOptions(**{"served_model_name": ("counting",), **options})
    listener = bind("127.0.0.1", 0)
    started, box = threading.Event(), []

    def run() -> None:
        async def main() -> None:
            server = server_of(llm, settings, [OPENAI, RESPONSES, ANTHROPIC, OLLAMA])
            box.append(server)
            task = asyncio.create_task(server.serve([listener]))
            while not server.started and not task.done():
                await asyncio.sleep(0.001)
            started.set()
            await task

        asyncio.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60)
        running = Running(url_of(listener), llm, box[0], box[0].service, thread)
        yield running
        running.wait_idle()
    finally:
        box[0].should_exit = True
        thread.join(60)
        llm.shutdown()
        listener.close()
    assert not thread.is_alive()
