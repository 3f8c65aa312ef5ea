"""A process that computes prompts: it is given one a line, as JSON, and says how to take it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.runtime.handover.workers import worker_on

from slipstream.runtime.loading import load

ROOT = Path(__file__).parents[3]


class PrefillProcess:
    """One that runs, of an engine; its files are in a directory."""

    def __init__(self, engine: Path, directory: Path, options: dict[str, Any]) -> None:
        # The package is found where this process finds it.
        path = os.pathsep.join([str(ROOT), *(each for each in sys.path if each)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(engine), str(directory), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """What it says of a prompt."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told


@contextmanager
def prefill_process(
    engine: Path, directory: Path, options: dict[str, Any]
) -> Iterator[PrefillProcess]:
    """One that ends with the block."""
    running = PrefillProcess(engine, directory, options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


async def _serve(engine: str, directory: str, options: dict[str, Any]) -> None:
    async with worker_on(load(engine, options), Path(directory)) as worker:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(dict(await worker.prefill(json.loads(line)))), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
