"""The deployment on a real Ray: one replica is killed while both have streams on their way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
# Ray's own warnings are none of ours, so it runs in processes of its own.
PROGRAM = """
import sys, time, ray
from ray import serve
for _ in range(600):
    try:
        ray.init(sys.argv[1], log_to_driver=False)
        break
    except Exception as error:
        print(error, file=sys.stderr)
        time.sleep(0.5)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
from examples.ray_serve.deployment import Slipstream
options = {"num_threads": 1, "max_batch_size": 8}
serve.run(Slipstream.bind(sys.argv[3], "tiny", options), name="slipstream", route_prefix="/")
print("ready", flush=True)
sys.stdin.readline()
serve.shutdown()
ray.shutdown()
"""


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.fixture
def url(tiny_engine: Path, tmp_path: Path) -> Iterator[str]:
    port, head, *agents = free_ports(6)
    names = (
        "dashboard-agent-grpc",
        "dashboard-agent-listen",
        "runtime-env-agent",
        "metrics-export",
    )
    # Where agents have ports that are known, Ray's start does not depend on how fast they are.
    given = [f"--{name}-port={each}" for name, each in zip(names, agents, strict=True)]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_agent_register_timeout_ms": "300000",
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    ray += [f"--port={head}", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    ray += ["--include-dashboard=false", *given]
    program = [sys.executable, "-c", PROGRAM, f"127.0.0.1:{head}", port, str(tiny_engine)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        (tmp_path / "log").open("w+") as log,
        subprocess.Popen(ray, stdout=log, stderr=log, env=environment) as node,
        subprocess.Popen(program, **pipes, stderr=log, env=environment) as driver,
    ):
        assert driver.stdin is not None and driver.stdout is not None
        try:
            line = driver.stdout.readline()
            assert line == b"ready\n", (tmp_path / "log").read_text()[-4000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            driver.stdin.close()
            driver.wait(120)
            node.terminate()


def replicas(url: str, seen: int = 40) -> set[int]:
    """The processes that answer, by what each says of itself."""
    found = set()
    for _ in range(seen):
        text = httpx.get(f"{url}/metrics", timeout=60).text
        (line,) = (each for each in text.splitlines() if each.startswith("process_start_time"))
        found.add(float(line.split()[-1]))
    return {_process(start) for start in found}


def _process(start: float) -> int:
    """The replica that was started then, of those that run on this machine."""
    near: dict[int, float] = {
        each.pid: abs(each.create_time() - start)
        for each in psutil.process_iter()
        if "ServeReplica" in " ".join(each.cmdline()[:1])
    }
    return min(near, key=lambda pid: near[pid])


def stream(url: str, seed: int, begun: Event | None = None) -> tuple[str, bool]:
    """The text of a stream, and whether it came to its end; ``begun`` is set when it has some."""
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": f"{seed} and",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    text, ended = "", False
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if begun is not None:
                        begun.set()
    except httpx.TransportError:
        pass
    return text, ended


@pytest.mark.slow
def test_streams_of_a_replica_that_lives_go_on(url: str) -> None:
    before = replicas(url)
    assert len(before) == 2
    with ThreadPoolExecutor(8) as pool:
        begun = [Event() for _ in range(8)]
        streams = [pool.submit(stream, url, seed, event) for seed, event in enumerate(begun)]
        assert all(event.wait(120) for event in begun), "a stream has not begun"
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        told = [each.result() for each in streams]
    assert any(ended for _, ended in told), "no stream of the other replica came to its end"
    assert all(stream(url, seed)[1] for seed in range(4)), "requests after it are answered"
    for _ in range(60):  # until Ray has replaced it
        now = replicas(url)
        if len(now) == 2:
            break
        time.sleep(1)
    assert len(now) == 2 and victim not in now
