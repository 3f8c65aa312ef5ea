"""A frontend of Dynamo's with a router, and workers on devices that can be made to wait."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.server.openai.serving import samples_of

from slipstream.runtime.executors.counting import next_token
from slipstream.runtime.testing import ALPHABET, VOCAB_SIZE

ROOT = Path(__file__).parents[3]
PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
_PROGRAM = """
import sys
from tests.server.devices import BrokenDevice, HeldDevice, engine_on
import slipstream.server.commands.dynamo_worker as module
from slipstream.server.cli import main
directory = sys.argv.pop()
module.load_model = lambda model, runtime: engine_on({device}, **runtime)
main()
"""


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def continued(prompt: str, count: int) -> str:
    """What the counting model says after a prompt."""
    token, said = ALPHABET.index(prompt[-1]), ""
    for _ in range(count):
        token = next_token(token, VOCAB_SIZE, 0)
        said += ALPHABET[token]
    return said


def free_port() -> int:
    """One below 32768, as Dynamo wants it."""
    for port in random.sample(range(10_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def spawn(
    command: list[str], directory: Path, log: Path, **variables: str
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "DYN_FILE_KV": str(directory / "kv"),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


@dataclass(slots=True)
class Running:
    """A worker; its device takes no step while it is held, but one for every ``step``."""

    process: subprocess.Popen[bytes]
    directory: Path
    port: int

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def hold(self) -> None:
        (self.directory / "gate").touch()

    def step(self) -> None:
        (self.directory / "permit").touch()

    def go_on(self) -> None:
        (self.directory / "gate").unlink(missing_ok=True)

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
        except httpx.TransportError:
            assert self.alive, self.directory.with_suffix(".log").read_text()[-3000:]
            return False

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=60).text
        return sum(v for k, v in samples_of(text).items() if k.split(" ")[0] == name)

    @property
    def prompts(self) -> float:
        """Tokens of prompts that it has answered."""
        return self.metric("slipstream:prompt_tokens_total")


@dataclass(slots=True)
class Stream:
    """A completion that is being read, by a thread of its own."""

    fleet: Fleet
    prompt: str
    count: int
    text: str = ""
    reason: str | None = None
    error: str | None = None
    _left: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Close the connection at the next token."""
        self._left.set()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def check(self) -> None:
        """All has come, and nothing twice."""
        wait(lambda: self.over)
        assert self.error is None, self.error
        assert (self.text, self.reason) == (continued(self.prompt, self.count), "length")

    def _read(self) -> None:
        url = f"{self.fleet.url}/v1/completions"
        body = self.fleet.body(self.prompt, self.count, stream=True)
        try:
            with httpx.stream("POST", url, json=body, timeout=180) as got:
                for line in got.iter_lines():
                    if self._left.is_set():
                        return
                    self._take(line)
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        data = json.loads(line.removeprefix("data: "))
        if "error" in data or not data.get("choices"):
            self.error = line if "error" in data else self.error
            return
        self.text += data["choices"][0]["text"] or ""
        self.reason = data["choices"][0].get("finish_reason") or self.reason


@dataclass(slots=True)
class Fleet:
    """A frontend and its workers."""

    directory: Path
    url: str
    workers: list[Running] = field(default_factory=list)
    _number: int = 0

    def add(
        self, *options: str, device: str = "HeldDevice(directory)", serves: bool = True
    ) -> Running:
        """Start one more worker and wait until the frontend knows it, and can answer with it unless
        others are to come before it ``serves``."""
        self._number += 1
        before = self.instances()  # one that was killed may be known for a while
        directory, port = self.directory / f"w{self._number}", free_port()
        directory.mkdir()
        arguments = ["dynamo-worker", "counting", *PLANES, *options]
        arguments += ["--served-model-name", "counting"]
        process = spawn(
            [sys.executable, "-c", _PROGRAM.format(device=device), *arguments, str(directory)],
            self.directory,
            directory.with_suffix(".log"),
            DYN_SYSTEM_PORT=str(port),
        )
        self.workers.append(running := Running(process, directory, port))
        wait(running.ready)
        wait(lambda: bool(self.instances() - before) and (self._serves() or not serves))
        return running

    def of(self, count: int) -> list[Running]:
        """So many workers that are alive and idle."""
        self.workers = [worker for worker in self.workers if worker.alive]
        while len(self.workers) < count:
            self.add()
        assert not any(worker.metric("slipstream:num_requests_running") for worker in self.workers)
        return self.workers

    def instances(self) -> set[int]:
        """Workers that the frontend knows."""
        found = httpx.get(f"{self.url}/health", timeout=60).json().get("instances", ())
        return {each["instance_id"] for each in found if each["endpoint"] == "generate"}

    def _serves(self) -> bool:
        models = httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]
        return bool(models)

    def body(self, prompt: str, count: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        return {
            "model": "counting",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            **more,
        }

    def ask(self, prompt: str, count: int = 1, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """A completion in one piece."""
        body = self.body(prompt, count, **more)
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@contextmanager
def running_fleet(directory: Path) -> Iterator[Fleet]:
    """A frontend without workers; all end with the block."""
    port = free_port()
    command = [sys.executable, "-m", "dynamo.frontend", *PLANES, "--http-port", str(port)]
    command += ["--router-mode", "kv", "--migration-limit", "3"]
    log = directory / "frontend.log"
    frontend = spawn(command, directory, log)
    fleet = Fleet(directory, f"http://127.0.0.1:{port}")

    def answers() -> bool:
        assert frontend.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{fleet.url}/health").status_code < 600
        except httpx.TransportError:
            return False

    try:
        wait(answers)
        yield fleet
    finally:
        for process in [frontend, *(worker.process for worker in fleet.workers)]:
            process.send_signal(signal.SIGKILL)
            process.wait()
