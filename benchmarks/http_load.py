"""What clients see of ``slipstream serve`` beside what the engine does without it.

    python benchmarks/http_load.py ENGINE --json benchmarks/results/http_load.json
    python benchmarks/http_load.py ENGINE --streams 64 --chats 0
    python benchmarks/http_load.py --address 127.0.0.1:8000 --loads 1:8:128:256 64:256:128:256

Offline: ``slipstream bench throughput`` with as many requests in flight as there are streams. HTTP:
the same requests from client processes that only look at the clock; each stream sends the next one
of all that are left when one ends. Chats: the same again while conversations of ``--words`` words
arrive by chance, so many a second, for as long as the streams run; they begin alike, as those of
one system prompt do, so that the device finds most of each in its cache and what is seen is mostly
the host's. Prompts are random tokens, answers greedy and of full length. Reported are output tokens
a second, seconds to the first token, and between two pieces of one stream. The server is asked
``--settle`` seconds after its start, in which it captures graphs.

With ``--address``, only loads of streams, requests, tokens in and out, one after the other, on any
server of OpenAI's completions, ours or another's, that takes prompts as tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import uvloop
from server_overhead import Reader, announced

_CLIENTS = 6  # processes
_CHAT_TOKENS = 8
_PROCESSES = multiprocessing.get_context("spawn")
_CLI = [sys.executable, "-m", "slipstream.server.cli"]
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: ``streams`` at once, ``requests`` in all, so many tokens in and out."""

    streams: int
    requests: int
    input_len: int
    output_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Common:
    """What clients share: how many requests are left, and that all of them are ready."""

    left: Synchronized[int]
    ready: Barrier

    def takes_one(self) -> bool:
        """Whether there was one left."""
        with self.left.get_lock():
            self.left.value -= 1
            return self.left.value >= 0


@dataclass(slots=True)
class Seen:
    """What clients saw: begins and ends of their work, seconds to first pieces and between pieces,
    those of a token after the first of each request, requests that did not end well."""

    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    failed: int = 0

    def add(self, other: Seen) -> None:
        """What another client saw, too."""
        for name in ("began", "ended", "first", "gaps", "each"):
            getattr(self, name).extend(getattr(other, name))
        self.failed += other.failed


async def ask(address: Address, path: str, body: dict[str, Any]) -> Reader:
    """A request, to its end."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    reader = Reader(head.encode() + content)
    await loop.create_connection(lambda: reader, *address)
    await reader.ended
    return reader


async def streams(address: Address, load: Load, seed: int, common: Common) -> Seen:
    """A client's share of the streams, which take of the requests that are left to all."""
    rng, seen = random.Random(seed), Seen()

    async def stream() -> None:
        while common.takes_one():
            prompt = rng.choices(range(100, load.vocab_size), k=load.input_len)
            body = {"prompt": prompt, "max_tokens": load.output_len, "ignore_eos": True}
            sent = time.time()
            clock = time.perf_counter()
            reader = await ask(
                address, "/v1/completions", {**body, "temperature": 0, "stream": True}
            )
            seen.began.append(sent)
            seen.ended.append(time.time())
            if not reader.times:
                seen.failed += 1
                continue
            seen.first.append(reader.times[0] - clock)
            seen.gaps += [b - a for a, b in zip(reader.times, reader.times[1:], strict=False)]
            seen.each.append((reader.times[-1] - reader.times[0]) / max(load.output_len - 1, 1))

    common.ready.wait()
    await asyncio.gather(*(stream() for _ in range(load.streams)))
    return seen


async def chats(address: Address, words: int, rate: float, stop: Callable[[], bool]) -> Seen:
    """Conversations that arrive by chance, ``rate`` a second, until told to stop."""
    rng, seen = random.Random(1), Seen()
    alike = " ".join(f"t{rng.randrange(100, 20_000)}" for _ in range(words - 20))
    running: set[asyncio.Task[None]] = set()

    async def chat(text: str) -> None:
        messages = [{"role": "user", "content": text}]
        body = {
            "messages": messages,
            "max_tokens": _CHAT_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        clock = time.perf_counter()
        reader = await ask(address, "/v1/chat/completions", {**body, "temperature": 0})
        seen.began.append(clock)
        if reader.times:
            seen.first.append(reader.times[0] - clock)
        else:
            seen.failed += 1

    due = time.perf_counter()
    while not stop():
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        own = " ".join(f"t{rng.randrange(100, 20_000)}" for _ in range(20))
        task = asyncio.get_running_loop().create_task(chat(f"{alike} {own}"))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return seen


def _run(queue: Any, work: Callable[..., Awaitable[Seen]], *arguments: Any) -> None:  # noqa: ANN401
    queue.put(uvloop.run(work(*arguments)))  # type: ignore[arg-type]


def measure(
    address: Address, load: Load, words: int = 0, rate: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """The streams, of prompts by a seed, and beside them chats if there is a rate."""
    queue, done, seen = _PROCESSES.Queue(), threading.Event(), Seen()
    clients = min(_CLIENTS, load.streams)
    shares = [
        replace(load, streams=load.streams // clients + (i < load.streams % clients))
        for i in range(clients)
    ]
    common = Common(_PROCESSES.Value("q", load.requests), _PROCESSES.Barrier(clients))
    processes = [
        _PROCESSES.Process(target=_run, args=(queue, streams, address, share, seed + i, common))
        for i, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    beside: list[Seen] = []
    arrivals = threading.Thread(
        target=lambda: beside.append(uvloop.run(chats(address, words, rate, done.is_set)))
    )
    if rate:
        arrivals.start()
    for _ in processes:
        seen.add(queue.get())
    done.set()
    for process in processes:
        process.join()
    seconds = max(seen.ended) - min(seen.began)
    usual = max(_percentile(seen.gaps, 0.5), 1e-6)  # pieces may come together
    figures = {
        "output_tokens_per_second": (load.requests - seen.failed) * load.output_len / seconds,
        "first_token_p50_ms": statistics.median(seen.first) * 1e3,
        "token_p50_ms": statistics.median(seen.each) * 1e3,
        "between_p50_ms": _percentile(seen.gaps, 0.5) * 1e3,
        "between_p99_ms": _percentile(seen.gaps, 0.99) * 1e3,
        "between_p99_over_p50": _percentile(seen.gaps, 0.99) / usual,
        "failed": float(seen.failed),
    }
    if rate:
        arrivals.join()
        figures["chats"] = float(len(beside[0].began))
        figures["chats_failed"] = float(beside[0].failed)
        if beside[0].first:
            figures["chat_first_token_p50_ms"] = statistics.median(beside[0].first) * 1e3
    return figures


def _percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


@contextmanager
def server(engine: Path, options: list[str]) -> Iterator[Address]:
    """``slipstream serve`` on a free port."""
    command = [*_CLI, "serve", str(engine), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            address = announced(process)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield address
        finally:
            process.send_signal(signal.SIGTERM)


def offline(engine: Path, load: Load, given: list[str]) -> dict[str, float]:
    """The same requests without a server."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        command = [*_CLI, "bench", "throughput", str(engine), "--json", str(report)]
        command += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.streams)]
        command += ["--input-len", str(load.input_len), "--output-len", str(load.output_len)]
        command += given
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rates = json.loads(report.read_text())
    return {"output_tokens_per_second": _find(rates, "output_tokens_per_second")}


def _find(report: Any, name: str) -> float:  # noqa: ANN401 - of nested objects
    """A number in a report, wherever it stands."""
    if isinstance(report, dict):
        if name in report:
            return float(report[name])
        for each in report.values():
            if (found := _find(each, name)) >= 0:
                return found
    return -1.0


def measure_running(host: str, loads: list[str], vocab_size: int) -> dict[str, dict[str, float]]:
    """Loads on a server that runs, each with prompts of its own."""
    name, _, port = host.rpartition(":")
    address, report = (name, int(port)), {}
    measure(address, Load(8, 16, 128, 16, vocab_size), seed=_CLIENTS)  # warms up
    for number, text in enumerate(loads, 2):
        count, requests, input_len, output_len = map(int, text.split(":"))
        load = Load(count, requests, input_len, output_len, vocab_size)
        report[text] = measure(address, load, seed=number * _CLIENTS)
        print(text, report[text], flush=True)
    return report


def main() -> None:
    """Run, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("--address", help="HOST:PORT of a server that runs.")
    parser.add_argument("--loads", nargs="+", default=[], help="STREAMS:REQUESTS:IN:OUT")
    parser.add_argument("--vocab-size", type=int, default=128256, help="Of that server's model.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, default=768)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--chats", type=float, default=64, help="A second; 0: none.")
    parser.add_argument("--no-offline", action="store_true")
    parser.add_argument("--settle", type=float, default=8.0)
    parser.add_argument(
        "--runtime", nargs="*", default=[], help="Options of the engine, such as kv-cache-bytes 4G."
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.address:
        report = measure_running(options.address, options.loads, options.vocab_size)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
        return
    manifest = json.loads((options.engine / "engine.json").read_text())
    vocab_size = int(manifest["model"]["vocab_size"])
    load = Load(
        options.streams, options.requests, options.input_len, options.output_len, vocab_size
    )
    report = {}
    given = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(options.runtime)]
    if not options.no_offline:
        report["offline"] = offline(options.engine, load, given)
        print("offline", report["offline"], flush=True)
    with server(options.engine, given) as address:
        time.sleep(options.settle)
        measure(address, Load(options.streams, options.streams, 16, 16, vocab_size))  # warms up
        report["http"] = measure(address, load)
        print("http", report["http"], flush=True)
        if options.chats:
            # Prompts of their own: those before are in the cache, in part.
            report["http_and_chats"] = measure(
                address, load, options.words, options.chats, _CLIENTS
            )
            print("http and chats", report["http_and_chats"], flush=True)
    if "offline" in report:
        rate = "output_tokens_per_second"
        print(f"HTTP / offline: {report['http'][rate] / report['offline'][rate]:.3f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
