"""``slipstream serve`` in several processes, on a device that can be made to wait."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[4]
_URL = re.compile(r"\burl=(http://\S+)")
_PROGRAM = """
import sys
from tests.server.devices import {device}
from tests.server.devices import engine_on
import slipstream.server.commands.serve as module
from slipstream.server.cli import main
directory = sys.argv.pop()
module.load_model = lambda model, runtime: engine_on({device}(directory), **runtime)
main()
"""


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)


@dataclass(slots=True)
class Served:
    """A server, its log, which grows, and the gate of its device."""

    process: subprocess.Popen[str]
    url: str
    log: list[str]
    directory: Path
    reader: threading.Thread
    streams: list[httpx.Response] = field(default_factory=list)

    @property
    def members(self) -> list[psutil.Process]:
        """The processes that answer requests."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # it has ended
                if any("api_process" in word for word in child.cmdline()):
                    found.append(child)
        return found

    def owner(self, response: httpx.Response) -> psutil.Process:
        """Which of them has the other end of a response's connection."""
        port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
        (owner,) = (
            member
            for member in self.members
            if any(c.raddr and c.raddr.port == port for c in member.net_connections())
        )
        return owner

    @contextmanager
    def held(self) -> Iterator[None]:
        """The device takes a step only where it is ``permitted``."""
        gate = self.directory / "gate"
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    def permit(self) -> None:
        """Let the device take one step, and wait until it has begun."""
        permit = self.directory / "permit"
        permit.touch()
        wait(lambda: not permit.exists())


@contextmanager
def served(
    directory: Path, processes: int, *options: str, device: str = "HeldDevice"
) -> Iterator[Served]:
    """A server with so many processes that answer requests."""
    program = _PROGRAM.format(device=device)
    command = [sys.executable, "-c", program, "serve", "counting", "--port", "0"]
    command += ["--api-processes", str(processes), *options, str(directory)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", str(ROOT)])}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as child:
        assert child.stderr is not None
        log: list[str] = []
        url = None
        try:
            while url is None:
                line = child.stderr.readline()
                assert line, f"the server did not start: {''.join(log)}"
                log.append(line)
                url = _URL.search(line)
            reader = threading.Thread(target=log.extend, args=(child.stderr,))
            reader.start()
            yield Served(child, url[1], log, directory, reader)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
        reader.join(60)  # and with it all that could still write
