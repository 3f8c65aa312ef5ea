"""What the HTTP server adds to the time between tokens.

    python benchmarks/server_overhead.py engines/smollm2 --json results.json

Every round runs the same greedy streams three times: through ``AsyncLLM`` in this process, through
``slipstream serve`` in another, read by a client that only looks at the clock, and through
``AsyncLLM`` again. Reported is the median over rounds of the ratio of the median times between two
tokens of a stream. A round in which the two bare runs differ by more than a tenth was disturbed by
something else on the machine and does not count. Beside it: the processor time that the event loop
of either takes for a token, and that of the client (Linux only).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop
from cpu_peers import cpu_name

from slipstream import AsyncLLM, SamplingParams

_URL = re.compile(r"\burl=http://([^:\s]+):(\d+)")
_PROMPT_TOKENS = 64
_DISTURBED = 0.1
Gaps = list[float]


class Reader(asyncio.Protocol):
    """Sends one request and notes when each event of the answer came."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.times: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        cast(asyncio.Transport, transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        """Look at the clock."""
        now = time.perf_counter()
        self.times += [now] * data.count(b"data: {")

    def connection_lost(self, error: Exception | None) -> None:
        """The answer is complete."""
        self.ended.set_result(None)


async def served(address: tuple[str, int], prompts: list[list[int]], tokens: int) -> Gaps:
    """Times between tokens of all streams, in seconds, as a client sees them."""
    loop, readers = asyncio.get_running_loop(), []
    for prompt in prompts:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        content = json.dumps({**body, "temperature": 0, "stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        reader = Reader(head.encode() + content)
        await loop.create_connection(lambda reader=reader: reader, *address)  # type: ignore[misc]
        readers.append(reader)
    await asyncio.gather(*(reader.ended for reader in readers))
    return gaps([reader.times for reader in readers])


async def bare(llm: AsyncLLM, prompts: list[list[int]], tokens: int) -> Gaps:
    """The same from ``AsyncLLM``."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def stream(prompt: list[int]) -> list[float]:
        outputs = llm.generate(prompt, params, output_kind="delta")
        # Tokens without text make no event.
        return [time.perf_counter() async for output in outputs if output.outputs[0].text]

    return gaps(await asyncio.gather(*(stream(prompt) for prompt in prompts)))


def gaps(streams: list[list[float]]) -> Gaps:
    """Times between neighbours, but the first tenth, where prompts are still computed."""
    return [
        after - before
        for times in streams
        for before, after in zip(
            times[len(times) // 10 :], times[len(times) // 10 + 1 :], strict=False
        )
    ]


@dataclass(frozen=True, slots=True)
class Served:
    """A server in another process."""

    address: tuple[str, int]
    pid: int

    def cpu_us(self) -> float:
        """Processor time of its event loop, which runs in the main thread."""
        line = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text()
        return int(line.split()[0]) / 1000


def announced(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Host and port, once a server has logged them."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := _URL.search(line):
            return found[1], int(found[2])
    raise RuntimeError("the server did not start")


@contextmanager
def server(engine: Path) -> Iterator[Served]:
    """``slipstream serve`` on a free port."""
    command = [sys.executable, "-m", "slipstream.server.cli", "serve", str(engine), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Served(announced(process), process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


async def run_round(
    llm: AsyncLLM, other: Served, prompts: list[list[int]], tokens: int
) -> dict[str, float]:
    """One round: times between tokens in ms, processor time in us a token."""
    total = len(prompts) * tokens
    here = time.thread_time()
    before = statistics.median(await bare(llm, prompts, tokens))
    bare_cpu, here, there = time.thread_time() - here, time.thread_time(), other.cpu_us()
    found = statistics.median(await served(other.address, prompts, tokens))
    client_cpu, served_cpu = time.thread_time() - here, other.cpu_us() - there
    after = statistics.median(await bare(llm, prompts, tokens))
    return {
        "bare_ms": (before + after) / 2 * 1000,
        "served_ms": found * 1000,
        "bare_apart": abs(after - before) / before,
        "bare_cpu_us": bare_cpu * 1e6 / total,
        "served_cpu_us": served_cpu / total,
        "client_cpu_us": client_cpu * 1e6 / total,
    }


async def measure(
    llm: AsyncLLM, other: Served, options: argparse.Namespace
) -> list[dict[str, float]]:
    """The rounds that count; the first warms up."""
    rng, rounds = random.Random(0), []
    for number in range(options.rounds + 1):
        prompts = [
            [rng.randrange(100, 20_000) for _ in range(_PROMPT_TOKENS)]
            for _ in range(options.streams)
        ]
        result = await run_round(llm, other, prompts, options.tokens)
        print({name: round(value, 2) for name, value in result.items()}, flush=True)
        if number and result["bare_apart"] < _DISTURBED:
            rounds.append(result)
    return rounds


def main() -> None:
    """Run, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    llm = AsyncLLM(options.engine)
    try:
        with server(options.engine) as other:
            rounds = uvloop.run(measure(llm, other, options))
    finally:
        llm.shutdown()
    if not rounds:
        raise SystemExit("every round was disturbed; run this on a quiet machine")
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    overhead = statistics.median(r["served_ms"] / r["bare_ms"] for r in rounds) - 1
    report = {
        "cpu": cpu_name(),
        "streams": options.streams,
        "tokens": options.tokens,
        "overhead": overhead,
        "medians": medians,
        "rounds": rounds,
    }
    print(
        f"the server adds {overhead:.1%} to the time between tokens (p50), in {len(rounds)} rounds"
    )
    print(medians)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
