"""SIGTERM to a server in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.server.core.processes.servers import wait

ROOT = Path(__file__).parents[3]
_PROGRAM = """
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.testing import counting_engine
from slipstream.server.core.logs import structured_logs
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.http.listener import bind
from slipstream.server.core.http.process import run
from slipstream.server.openai.api import OPENAI
from tests.server.devices import HeldDevice, engine_on

options = ServerOptions(served_model_name=("counting",), drain_timeout={timeout})
with bind("127.0.0.1", 0) as listener, structured_logs("text"):
    run(AsyncLLM.from_engine({engine}), options, listener, [OPENAI])
"""
_URL = re.compile(r"\burl=(http://\S+)")


@contextmanager
def process(
    timeout: float, engine: str = "counting_engine()"
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server process, its URL, and its log, which grows."""
    program = _PROGRAM.format(timeout=timeout, engine=engine)
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stderr is not None
        log: list[str] = []
        url = None
        while url is None:
            line = child.stderr.readline()
            assert line, f"the server did not start: {''.join(log)}"
            log.append(line)
            url = _URL.search(line)
        reader = threading.Thread(target=log.extend, args=(child.stderr,))
        reader.start()
        try:
            yield child, url[1], log
        finally:
            child.kill()
            reader.join()


@contextmanager
def stream(url: str, tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a stream after the first."""
    body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def held_process(
    directory: Path, timeout: float
) -> AbstractContextManager[tuple[subprocess.Popen[str], str, list[str]]]:
    """The same on a device that waits while there is a gate."""
    return process(timeout, f"engine_on(HeldDevice({str(directory)!r}))")


def wait_for_503(url: str) -> None:
    wait(lambda: httpx.get(f"{url}/health", timeout=60).status_code == 503)


def test_sigterm_lets_a_stream_end_and_takes_no_more(tmp_path: Path) -> None:
    gate, permit = tmp_path / "gate", tmp_path / "permit"
    gate.touch()
    permit.touch()
    with held_process(tmp_path, timeout=600) as (child, url, log):
        with stream(url, tokens=30) as lines:
            child.send_signal(signal.SIGTERM)
            wait_for_503(url)
            refused: Any = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60)
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            gate.unlink()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert child.wait(60) == 0
    assert any(" draining requests=1" in line for line in log)
    assert any(line.endswith(" stopped\n") for line in log)


def test_what_lasts_longer_than_the_drain_timeout_is_ended_with_an_error(tmp_path: Path) -> None:
    gate, permit = tmp_path / "gate", tmp_path / "permit"
    gate.touch()
    permit.touch()
    with held_process(tmp_path, timeout=0.1) as (child, url, log):
        with stream(url, tokens=200) as lines, futures.ThreadPoolExecutor() as pool:
            child.send_signal(signal.SIGTERM)
            wait(lambda: any(" aborting requests=1" in line for line in log))
            ended = pool.submit(lambda: [line for line in lines if line])
            while not ended.done():  # after a step or two, in which the engine hears of it
                permit.touch()
                futures.wait([ended], timeout=0.1)
            rest = ended.result()
        assert rest[-1].startswith('data: {"error": {"message": "the server is shutting down')
        assert child.wait(60) == 0


def test_a_second_signal_ends_at_once() -> None:
    with (
        process(timeout=600, engine="counting_engine(delay=1)") as (child, url, _),
        stream(url, tokens=200),
    ):
        child.send_signal(signal.SIGINT)
        wait_for_503(url)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0


def test_an_idle_server_ends_at_once() -> None:
    with process(timeout=60) as (child, _, _):
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
