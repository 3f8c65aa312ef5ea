"""What an attacker sends, one after the other, beside sixteen honest streams.

    python benchmarks/hostile.py engines/smollm2 --json benchmarks/results/hostile.json

Starts ``slipstream serve`` itself, on this machine only. Fails (exit status 1) when an attack is
answered with a 5xx, when requests, pages or memory are left behind, or when a gap between two
events of an honest stream is more than three times their median beside the attacks. Prompts take
few tokens of a step (``OPTIONS``), so that one that is rightly computed is no gap either. Between
two attacks the streams are alone for a while: a machine that others use makes gaps of its own, and
what it did then is no attack's fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from soak import Server, serving

CACHE_MB = 128
OPTIONS = [
    *("--max-batch-size", "24", "--max-num-tokens", "48", "--max-prefill-tokens", "16"),
    *("--kv-cache-bytes", f"{CACHE_MB}M"),
]
STREAMS = 16
AIM = 3.0
# Beside the pages of the cache, which take memory once they are written.
GROWTH_MB = 64
MEGABYTE = 1 << 20
_ALONE_S = 10.0
_AFTER_S = 0.5  # for what an attack left on its way
_BETWEEN_S = 2.0  # alone, between two attacks
_SOCKETS = 500
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Attack = Callable[[Server], Awaitable[str]]


@dataclass(slots=True)
class Gaps:
    """Milliseconds between two events of a stream."""

    median: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Gaps:
        """From what was seen."""
        ordered = sorted(1000 * gap for gap in seconds)
        last = len(ordered) - 1
        return cls(*(round(ordered[int(part * last)], 1) for part in (0.5, 0.99, 1.0)))


@dataclass(slots=True)
class Outcome:
    """How an attack ended, and what it did to others while it lasted."""

    answer: str
    seconds: float
    gaps_ms: Gaps
    median_before_ms: float
    longest_health_ms: float
    small_request_s: float
    memory_mb: int


@dataclass(slots=True)
class Report:
    """``failures`` is empty when the server stood it. ``alone`` is before and between attacks,
    ``slowdown`` the median of what attacks made of the median gap before them."""

    alone: Gaps
    beside: Gaps
    longest_to_median: float
    longest_to_median_alone: float
    slowdown: float
    attacks: dict[str, Outcome]
    gauges_at_end: dict[str, float]
    memory_before_mb: int
    memory_after_mb: int
    failures: list[str] = field(default_factory=list)


class Honest:
    """Streams that go on and on, and probes of health; what they saw, by when."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.gaps: list[tuple[float, float]] = []
        self.health: list[tuple[float, float]] = []

    async def stream(self, number: int) -> None:
        """One stream after the other."""
        body = {"prompt": f"{number} rivers", "max_tokens": 100, "ignore_eos": True, "stream": True}
        while True:
            last = None
            async with self._server.client.stream("POST", COMPLETIONS, json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith('data: {"id"'):
                        now = time.monotonic()
                        if last is not None:
                            self.gaps.append((now, now - last))
                        last = now

    async def probe(self) -> None:
        """Ask for health ten times a second."""
        while True:
            asked = time.monotonic()
            await self._server.client.get("/health")
            self.health.append((time.monotonic(), time.monotonic() - asked))
            await asyncio.sleep(0.1)

    def gaps_of(self, since: float, until: float) -> list[float]:
        """Those that ended in between."""
        return [gap for at, gap in self.gaps if since < at <= until]

    def longest_health(self, since: float) -> float:
        """Milliseconds, of what was answered since then."""
        return round(1000 * max((took for at, took in self.health if at >= since), default=0.0), 1)


def post(path: str, body: Mapping[str, Any] | bytes) -> Attack:
    """An attack that is a body."""
    content = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()

    async def send(server: Server) -> str:
        headers = {"Content-Type": "application/json"}
        response = await server.client.post(path, content=content, headers=headers, timeout=600)
        return f"{response.status_code}, {len(response.content)} bytes"

    return send


async def long_headers(server: Server) -> str:
    """A header of 100 MB."""
    reader, writer = await _connect(server)
    sent = 0
    try:
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
        while sent < 100 * MEGABYTE:
            writer.write(b"a" * MEGABYTE)
            await writer.drain()
            sent += MEGABYTE
    except ConnectionError:
        return f"closed after {sent // MEGABYTE} MB"
    finally:
        writer.transport.abort()
    return (await reader.readline()).decode().strip() or "no answer"


async def silent_sockets(server: Server) -> str:
    """Connections that never send."""
    opened = [await _connect(server) for _ in range(_SOCKETS)]
    await asyncio.sleep(1)
    for _, writer in opened:
        writer.transport.abort()
    return f"held {len(opened)}"


async def _connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


def many(count: int) -> list[dict[str, Any]]:
    """As many of the cheapest thing that is no value anywhere."""
    return [{}] * count


LONG = "word " * 500
MANY = 1_390_000
ATTACKS: dict[str, Attack] = {
    "a prompt of 4 MB": post(COMPLETIONS, {"prompt": "a b " * (MEGABYTE - 50)}),
    "a prompt of 4 MB in one word": post(COMPLETIONS, {"prompt": "a" * (4 * MEGABYTE - 50)}),
    "a message of 4 MB": post(
        CHAT, {"messages": [{"role": "user", "content": "a b " * (MEGABYTE - 50)}]}
    ),
    "/tokenize of 600 KB": post("/tokenize", {"prompt": "a b " * 150_000}),
    "/detokenize of 262,000 tokens": post("/detokenize", {"tokens": [99] * 262_000}),
    "2.6 MB of allowed_token_ids": post(
        COMPLETIONS, {"prompt": "a", "allowed_token_ids": list(range(49_000)) * 8}
    ),
    "16,384 allowed_token_ids, 8 answers": post(
        COMPLETIONS, {"prompt": "a", "allowed_token_ids": list(range(16_384)), "n": 8,
                      "max_tokens": 16}
    ),
    "64 stop strings of 1,000": post(
        COMPLETIONS, {"prompt": "a", "stop": ["a" * 990 + f"{i:010}" for i in range(64)], "n": 8,
                      "logit_bias": {"81": 100}, "max_tokens": 32}
    ),
    "64 bad words of 1,000": post(
        COMPLETIONS, {"prompt": "a", "bad_words": [f"{i} " * 300 for i in range(64)], "n": 8,
                      "max_tokens": 16}
    ),
    "128 answers to a long prompt": post(COMPLETIONS, {"prompt": LONG, "n": 128, "max_tokens": 4}),
    "penalties on a long prompt": post(
        COMPLETIONS, {"prompt": LONG, "n": 8, "max_tokens": 16, "repetition_penalty": 1.2,
                      "presence_penalty": 1.0}
    ),
    "repetition_penalty 1e-39": post(COMPLETIONS, {"prompt": "a", "repetition_penalty": 1e-39}),
    "a key of 5,000 digits": post(COMPLETIONS, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}),
    "30,000 biases": post(
        COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(30_000)}}
    ),
    "30,000 unknown fields": post(COMPLETIONS, {str(i): 1 for i in range(30_000)}),
    "top_logprobs is an array": post(
        CHAT, {"messages": [], "logprobs": True, "top_logprobs": many(30_000)}
    ),
    "deep JSON": post(COMPLETIONS, b'{"prompt": ' + b"[" * (4 * MEGABYTE - 50)),
    "1.4 million {} as prompt": post(COMPLETIONS, {"prompt": many(MANY)}),
    "1.4 million {} as messages": post(CHAT, {"messages": many(MANY)}),
    "1.4 million {} as allowed_token_ids": post(
        COMPLETIONS, {"prompt": "a", "allowed_token_ids": many(MANY)}
    ),
    "1.4 million {} to /detokenize": post("/detokenize", {"tokens": many(MANY)}),
    "30,000 {} as messages": post(CHAT, {"messages": many(30_000)}),
    "260,000 token ids that are none": post(COMPLETIONS, {"prompt": [1] * 260_000 + ["a"]}),
    "128 x 2,000 x 20 log probabilities": post(
        COMPLETIONS, {"prompt": "a", "n": 128, "max_tokens": 2000, "logprobs": 20}
    ),
    "8 x 20 x 20 log probabilities": post(
        COMPLETIONS, {"prompt": "a", "n": 8, "max_tokens": 20, "logprobs": 20, "ignore_eos": True}
    ),
    "scores of a long prompt": post(
        COMPLETIONS, {"prompt": LONG, "echo": True, "logprobs": 20, "max_tokens": 0}
    ),
    "a priority": post(COMPLETIONS, {"prompt": "a", "priority": -(10**9)}),
    "headers of 100 MB": long_headers,
    "500 silent sockets": silent_sockets,
}  # fmt: skip


async def attack(server: Server, honest: Honest, name: str) -> tuple[Outcome, list[float]]:
    """Send one, and a small request beside it; also the gaps meanwhile, in seconds."""
    started = time.monotonic()
    small = asyncio.create_task(_small(server))
    try:
        answer = await ATTACKS[name](server)
    except (httpx.HTTPError, OSError) as error:
        answer = f"no answer ({error!r:.80})"
    seconds = round(time.monotonic() - started, 2)
    waited = await small
    await asyncio.sleep(_AFTER_S)
    gaps = honest.gaps_of(started, time.monotonic())
    before = Gaps.of(honest.gaps_of(started - _BETWEEN_S, started)).median
    health, memory = honest.longest_health(started), server.memory // MEGABYTE
    return Outcome(answer, seconds, Gaps.of(gaps), before, health, waited, memory), gaps


async def _small(server: Server) -> float:
    await asyncio.sleep(0.2)
    started = time.monotonic()
    await server.client.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 4})
    return round(time.monotonic() - started, 2)


async def measure(server: Server) -> Report:
    """Honest streams alone, then beside all attacks, then what is left."""
    honest = Honest(server)
    tasks = [asyncio.create_task(honest.stream(i)) for i in range(STREAMS)]
    tasks.append(asyncio.create_task(honest.probe()))
    await asyncio.sleep(_ALONE_S / 2)  # until all run
    alone, beside, outcomes = await _window(honest, _ALONE_S), [], {}
    before = server.memory // MEGABYTE
    for name in ATTACKS:
        alone += await _window(honest, _BETWEEN_S)
        outcomes[name], gaps = await attack(server, honest, name)
        beside += gaps
        print(f"{name}: {outcomes[name]}", file=sys.stderr)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gauges, after = await _settled(server), server.memory // MEGABYTE
    report = _report(Gaps.of(alone), Gaps.of(beside), outcomes, gauges, (before, after))
    _judge(report)
    return report


async def _window(honest: Honest, seconds: float) -> list[float]:
    begun = time.monotonic()
    await asyncio.sleep(seconds)
    return honest.gaps_of(begun, time.monotonic())


def _report(
    alone: Gaps,
    beside: Gaps,
    attacks: dict[str, Outcome],
    gauges: dict[str, float],
    memory: tuple[int, int],
) -> Report:
    slower = [each.gaps_ms.median / each.median_before_ms for each in attacks.values()]
    return Report(
        alone=alone,
        beside=beside,
        longest_to_median=round(beside.longest / beside.median, 2),
        longest_to_median_alone=round(alone.longest / alone.median, 2),
        slowdown=round(statistics.median(slower), 2),
        attacks=attacks,
        gauges_at_end=gauges,
        memory_before_mb=memory[0],
        memory_after_mb=memory[1],
    )


async def _settled(server: Server) -> dict[str, float]:
    """The gauges once they are nothing, or after seconds."""
    for _ in range(50):
        gauges = await server.gauges()
        if not any(gauges.values()):
            break
        await asyncio.sleep(0.1)
    return gauges


def _judge(report: Report) -> None:
    for name, outcome in report.attacks.items():
        if outcome.answer.startswith(("5", "no answer")):
            report.failures.append(f"{name}: {outcome.answer}")
    if report.longest_to_median > max(AIM, report.longest_to_median_alone):
        report.failures.append(f"a gap of {report.longest_to_median} times the median")
    grown = report.memory_after_mb - report.memory_before_mb
    if grown > CACHE_MB + GROWTH_MB:
        report.failures.append(f"memory grew by {grown} MB")
    left = {name: value for name, value in report.gauges_at_end.items() if value}
    if left:
        report.failures.append(f"left behind: {left}")


async def run(engine: str) -> Report:
    """Serve an engine and attack it."""
    async with serving(engine, OPTIONS) as server:
        return await measure(server)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments.engine))
    text = json.dumps(asdict(report), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    median = statistics.median(outcome.small_request_s for outcome in report.attacks.values())
    print(f"small requests beside attacks: {median} s", file=sys.stderr)
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
