"""Minutes of unfriendly traffic against a server: random arrivals at twice what it can do, answers
that are held to forms, call tools and think, through every API, clients that leave, requests that
are too long or malformed.

    python benchmarks/soak.py engines/smollm2 --minutes 10 --json benchmarks/results/soak.json

Starts ``slipstream serve`` itself, measures its capacity, and fails (exit status 1) when an answer
is an error that is no 4xx, or does not hold to its form, when pages or requests are left behind,
when the server's resident memory grows by more than 2 % after the first fifth, or when it does not
end on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

FORM = {
    "type": "object",
    "properties": {"mood": {"enum": ["bright", "small"]}, "count": {"type": "integer"}},
    "required": ["mood", "count"],
    "additionalProperties": False,
}
WORDS = "the a river stone light under over small bright slowly sings waits turns and".split()  # noqa: SIM905
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
# So that all of it is in use: what is not yet touched takes no memory, and would look like a leak.
TIGHT = ["--max-batch-size", "8", "--max-queued-requests", "16", "--kv-cache-bytes", "64M"]
# The model knows neither, but what it may write does.
PARSERS = ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
GROWTH = 1.02
WARM_UP = 0.2  # of the time, after which memory must stay flat
_SAMPLE_S = 0.5


@dataclass(slots=True)
class Server:
    """A running server and a client for it."""

    url: str
    process: psutil.Process
    client: httpx.AsyncClient

    @property
    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(int(process.memory_info().rss) for process in family)

    async def gauges(self) -> dict[str, float]:
        """The gauges that must return to nothing."""
        text = (await self.client.get("/metrics")).text
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return {name: found[f"slipstream:{name}"] for name in GAUGES}


@dataclass(slots=True)
class Report:
    """What happened; ``failures`` is empty when the server stood it."""

    seconds: float = 0.0
    capacity_per_s: float = 0.0
    offered_per_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    memory_after_warm_up: int = 0
    memory_at_end: int = 0
    gauges_at_end: dict[str, float] = field(default_factory=dict)


Traffic = Callable[[Server, random.Random], Awaitable[str]]


def prompt(rng: random.Random, words: int) -> str:
    """Random words."""
    return " ".join(rng.choices(WORDS, k=words))


def body(rng: random.Random, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """An ordinary completion request."""
    given = {
        "model": "soak",
        "prompt": prompt(rng, rng.randint(1, 60)),
        "max_tokens": rng.randint(1, 48),
        "temperature": rng.choice([0, 0.7, 1.0]),
        "n": rng.choice([1, 1, 1, 2]),
    }
    return given | changes


async def unary(server: Server, rng: random.Random) -> str:
    """An answer in one piece."""
    response = await server.client.post("/v1/completions", json=body(rng))
    return f"unary {response.status_code}"


async def streamed(server: Server, rng: random.Random) -> str:
    """A stream that is read to its end, or left after a few events."""
    leave = rng.random() < 0.4
    events = 0
    request = body(rng, stream=True)
    async with server.client.stream("POST", "/v1/completions", json=request) as response:
        async for line in response.aiter_lines():
            events += line.startswith("data:")
            if line.startswith('data: {"error"'):
                return f"stream with {line[:200]}"
            if leave and events > 3:
                return "stream left"
    return f"stream {response.status_code}"


async def impatient(server: Server, rng: random.Random) -> str:
    """A client that hangs up while its answer is computed."""
    try:
        request = body(rng, max_tokens=200, ignore_eos=True)
        response = await server.client.post("/v1/completions", json=request, timeout=0.05)
    except httpx.TimeoutException:
        return "unary left"
    return f"unary {response.status_code}"


async def hung_up(server: Server, rng: random.Random) -> str:
    """A connection that is reset in the middle of a request."""
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(rng.random() / 10)
    writer.transport.abort()
    return "connection reset"


def forms(rng: random.Random) -> dict[str, Any]:
    """A form of OpenAI's, of vLLM's, or of a kind that no cache has seen."""
    schema = {"name": "mood", "strict": True, "schema": FORM}
    fresh = {"type": "object", "properties": {prompt(rng, 3): {"const": rng.random()}}}
    given: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"guided_json": fresh},
        {"guided_regex": rng.choice(["[a-z]{1,40}", "(ab|cd)+", "a(b(c)?)?"])},
        {"guided_choice": rng.sample(WORDS, 4)},
        {"guided_grammar": 'start: /[a-c]+/ " and so it goes on and on " /[x-z]+/'},
        {"guided_regex": "(unclosed"},  # 400
    ]
    return rng.choice(given)


async def formed(server: Server, rng: random.Random) -> str:
    """A completion that is held to a form."""
    response = await server.client.post("/v1/completions", json=body(rng, **forms(rng)))
    return f"form {response.status_code}"


def chat(rng: random.Random, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """What the bodies of all chats have."""
    messages = [{"role": "user", "content": prompt(rng, rng.randint(1, 20))}]
    return {"model": "soak", "messages": messages, **changes}


def openai_turn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A chat with a tool that must be called, thoughts within a budget, or a form."""
    function = {"name": "tell", "strict": True, "parameters": FORM}
    most = rng.randint(1, 80)
    wanted: list[dict[str, Any]] = [
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {"reasoning_effort": "low", "thinking_token_budget": rng.randint(1, 20)},
        {"n": 2, **forms(rng)},
    ]
    return "/v1/chat/completions", chat(rng, max_tokens=most, **rng.choice(wanted))


def responses_turn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The same through the Responses API, stored or not."""
    form = {"type": "json_schema", "name": "mood", "schema": FORM}
    tool = {"type": "function", "name": "tell", "strict": True, "parameters": FORM}
    wanted: list[dict[str, Any]] = [
        {"tools": [tool], "tool_choice": {"type": "function", "name": "tell"}},
        {"text": {"format": form}, "reasoning": {"effort": "low"}},
    ]
    store, most = rng.random() < 0.5, rng.randint(16, 80)
    given = {"model": "soak", "input": prompt(rng, 9), "store": store, "max_output_tokens": most}
    return "/v1/responses", given | rng.choice(wanted)


def anthropic_turn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The same through Anthropic's."""
    tool = {"name": "tell", "input_schema": FORM}
    wanted: list[dict[str, Any]] = [
        {"tools": [tool], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "enabled", "budget_tokens": rng.randint(1, 20)}},
    ]
    return "/v1/messages", chat(rng, max_tokens=rng.randint(1, 80)) | rng.choice(wanted)


def ollama_turn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The same through Ollama's."""
    wanted: list[dict[str, Any]] = [{"format": "json"}, {"format": FORM}, {"think": True}]
    options = {"num_predict": rng.randint(1, 80)}
    return "/api/chat", chat(rng, options=options) | rng.choice(wanted)


TURNS = (openai_turn, responses_turn, anthropic_turn, ollama_turn)


async def turn(server: Server, rng: random.Random) -> str:
    """A conversation through one of the APIs, streamed or not; some leave in the middle."""
    kind = rng.choice(TURNS)
    path, given = kind(rng)
    streams, leave, size = rng.random() < 0.6, rng.random() < 0.3, 0
    async with server.client.stream("POST", path, json=given | {"stream": streams}) as response:
        async for text in response.aiter_text():
            size += len(text)
            if 'data: {"error"' in text or '"type":"error"' in text:
                return f"{kind.__name__} with data: {text[:200]}"
            if leave and size > 400:
                return f"{kind.__name__} left"
    return f"{kind.__name__} {response.status_code}"


async def held(server: Server, rng: random.Random) -> str:
    """A form that is over within its tokens, which the answer must hold to."""
    given = chat(rng, max_tokens=200, seed=rng.randint(0, 9), temperature=1)
    schema = {"name": "mood", "schema": {**FORM, "x-guidance": {"whitespace_flexible": False}}}
    given["response_format"] = {"type": "json_schema", "json_schema": schema}
    response = await server.client.post("/v1/chat/completions", json=given)
    if response.status_code == 200:
        (choice,) = response.json()["choices"]
        if choice["finish_reason"] == "stop":
            answer = json.loads(choice["message"]["content"])
            if answer.keys() != {"mood", "count"} or not isinstance(answer["count"], int):
                return f"held with data: {answer}"
    return f"held {response.status_code}"


async def too_long(server: Server, rng: random.Random) -> str:
    """A prompt longer than the engine holds."""
    response = await server.client.post("/v1/completions", json=body(rng, prompt="word " * 20_000))
    return f"too long {response.status_code}"


async def malformed(server: Server, rng: random.Random) -> str:
    """Something that is no request."""
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"content": b"{"}),
        ("/v1/completions", {"content": b"\xff\x00"}),
        ("/v1/completions", {"json": body(rng, temperature="hot")}),
        ("/v1/completions", {"json": body(rng, max_tokens=-1)}),
        ("/v1/completions", {"json": body(rng, prompt=[[1, 2], "x"])}),
        ("/v1/completions", {"json": body(rng, model="another")}),
        ("/v1/completions", {"json": body(rng, logit_bias={"x": 1})}),
        ("/v1/chat/completions", {"json": body(rng, messages="hello")}),
        ("/v1/nothing", {"json": {}}),
    ]
    path, given = rng.choice(bad)
    response = await server.client.post(path, **given)
    return f"malformed {response.status_code}"


TRAFFIC: dict[Traffic, float] = {
    unary: 20, streamed: 20, impatient: 10, hung_up: 5, too_long: 5, malformed: 10, formed: 10,
    turn: 25, held: 5,
}  # fmt: skip


async def capacity(server: Server, rng: random.Random, seconds: float) -> float:
    """Ordinary requests a second that the server completes when it is never idle."""
    done, end = 0, time.monotonic() + seconds

    async def ask() -> None:
        nonlocal done
        while time.monotonic() < end:
            await server.client.post("/v1/completions", json=body(rng))
            done += 1

    started = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(8)))
    return done / (time.monotonic() - started)


async def soak(server: Server, seconds: float, seed: int) -> Report:
    """Send the traffic, then look at what is left."""
    rng, report = random.Random(seed), Report(seconds=seconds)
    report.capacity_per_s = await capacity(server, rng, min(10.0, seconds / 6))
    report.offered_per_s = 2 * report.capacity_per_s
    memory: list[tuple[float, int]] = []
    started = time.monotonic()
    watch = asyncio.create_task(_watch(server, memory, started))
    await _send(server, rng, report, started + seconds)
    watch.cancel()
    await _settle(server, report)
    _judge(report, memory, seconds)
    return report


async def _send(server: Server, rng: random.Random, report: Report, end: float) -> None:
    flights: set[asyncio.Task[None]] = set()

    async def fly(kind: Traffic) -> None:
        try:
            outcome = await kind(server, rng)
        except (httpx.HTTPError, OSError) as error:
            outcome = f"{kind.__name__}: no answer ({error!r})"
        report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1

    while time.monotonic() < end:
        (kind,) = rng.choices(list(TRAFFIC), weights=list(TRAFFIC.values()))
        flight = asyncio.create_task(fly(kind))
        flights.add(flight)
        flight.add_done_callback(flights.discard)
        await asyncio.sleep(rng.expovariate(report.offered_per_s))
    await asyncio.gather(*flights)


async def _watch(server: Server, memory: list[tuple[float, int]], started: float) -> None:
    while True:
        memory.append((time.monotonic() - started, server.memory))
        await asyncio.sleep(_SAMPLE_S)


async def _settle(server: Server, report: Report) -> None:
    """Wait until the last requests of clients that left have ended; seconds are plenty."""
    for _ in range(50):
        report.gauges_at_end = await server.gauges()
        if not any(report.gauges_at_end.values()):
            return
        await asyncio.sleep(0.1)


def _judge(report: Report, memory: list[tuple[float, int]], seconds: float) -> None:
    for outcome in report.outcomes:
        refused = outcome.split()[-1]
        if "no answer" in outcome or "with data" in outcome or refused.startswith("5"):
            report.failures.append(outcome)
    left = {name: value for name, value in report.gauges_at_end.items() if value}
    if left:
        report.failures.append(f"left behind: {left}")
    warm = [size for at, size in memory if WARM_UP * seconds <= at < 2 * WARM_UP * seconds]
    late = [size for at, size in memory if at >= (1 - WARM_UP) * seconds]
    report.memory_after_warm_up = int(statistics.median(warm))
    report.memory_at_end = int(statistics.median(late))
    if report.memory_at_end > GROWTH * report.memory_after_warm_up:
        report.failures.append(
            f"memory grew from {report.memory_after_warm_up} to {report.memory_at_end} bytes"
        )


@asynccontextmanager
async def serving(engine: str, options: list[str]) -> AsyncIterator[Server]:
    """A server of an engine on a free port; ends it with SIGTERM and expects it to end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slipstream.server.cli", "serve", engine]
    command += ["--port", str(port), "--served-model-name", "soak", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
            await _wait_until_healthy(client, process)
            yield Server(url, psutil.Process(process.pid), client)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if status:
        raise RuntimeError(f"the server ended with status {status}")


async def _wait_until_healthy(client: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the server ended with status {process.returncode} at its start")


async def run(engine: str, minutes: float, seed: int) -> Report:
    """Serve an engine and soak it."""
    async with serving(engine, [*TIGHT, *PARSERS]) as server:
        return await soak(server, minutes * 60, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments.engine, arguments.minutes, arguments.seed))
    text = json.dumps(asdict(report), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
