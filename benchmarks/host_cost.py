"""What a token costs the host beside the device: the loop, AsyncLLM, and the HTTP server.

    python benchmarks/host_cost.py --json benchmarks/results/host_cost.json
    python benchmarks/host_cost.py --tree old=../before/src --tree new=src

The device is the counting model, which has no weights, without its checks (more than half of an
engine's thread at many streams: ``--checked`` has them), so all that is measured is scheduling,
batches, sampling's bookkeeping, text and transport. A device that takes no time is asked for steps
of few rows while requests come in; with ``--step-ms`` it takes some, as real ones do, and streams
run together. They run greedily, all at once:

    loop   through ``LLM.generate``: one thread, nothing in between
    async  through ``AsyncLLM``, one task a stream, text as it is made
    http   from a real server in a process of its own, over one connection a stream, which
           ``--clients`` processes read
    split  from one whose requests are answered by ``--processes`` before the one with the engine

Every figure comes from a fresh process that runs once to warm up. In every round all trees, layers
and numbers of streams take turns; reported are the medians over rounds, in microseconds a token:
``cpu``, the processor time of all threads of the processes (Linux only), ``most``, that of the
busiest of them, which bounds what they can do with a core each, ``wall``, from the first
request to the last token, and where there are clients, what the busiest of those takes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import uvloop
from cpu_peers import cpu_name
from server_overhead import announced, served

from slipstream import LLM, AsyncLLM, SamplingParams
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.executors.counting import CountingExecutor, next_token
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine

LAYERS = ("loop", "async", "http", "split")
STREAMS = (1, 64, 256, 1024)
TOKENS = 200  # a stream
LEAST_TOKENS = 10_000  # a figure
_PROMPT_TOKENS = 16
_PAGE_SIZE = 16
# `slipstream serve`, with the counting model in the place of the engine that it would load.
_SERVER = """
import slipstream.server.commands.serve as command
from host_cost import engine_of

command.load_model = lambda model, runtime: engine_of({streams}, checked={checked}, delay={delay})
command.serve.main(["counting", "--port", "0", *{options}])
"""
Figure = dict[str, float]
Run = Callable[[list[list[int]]], None]
_SPAWN = multiprocessing.get_context("spawn")
_client_seconds: list[float] = []  # of each client, of the last run


class Unchecked(CountingExecutor):
    """The counting model without caches and checks, of greedy sequences that the host knows: what a
    device does is no part of what the host does beside it."""

    def _run(self, planned: StepBatch, excused: bool) -> StepResult:
        last = planned.token_ids[planned.logits_rows].tolist()
        tokens = [next_token(token, VOCAB_SIZE) for token in last]
        return StepResult(tokens, [None] * len(tokens))


def engine_of(streams: int, *, checked: bool = False, delay: float = 0.0) -> LoadedEngine:
    """A counting model that runs so many streams at once, in steps of ``delay`` seconds."""
    pages = streams * (-(-(_PROMPT_TOKENS + TOKENS) // _PAGE_SIZE) + 1)
    tokens = max(512, streams)
    engine = counting_engine(
        pages, delay=delay, page_size=_PAGE_SIZE, max_batch_size=streams, max_num_tokens=tokens
    )
    if not checked:
        assert isinstance(engine.executor, CountingExecutor)
        engine.executor.__class__ = Unchecked
    return engine


def params() -> SamplingParams:
    """Greedy, to the last token."""
    return SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: how many streams, through so many processes (0: in that of the engine), and
    read by so many; ``delay`` is seconds that the device takes for a step."""

    streams: int
    processes: int = 0
    clients: int = 1
    checked: bool = False
    delay: float = 0.0

    def engine(self) -> LoadedEngine:
        """The device."""
        return engine_of(self.streams, checked=self.checked, delay=self.delay)


@contextmanager
def loop(case: Case) -> Iterator[tuple[Run, int]]:
    """``LLM`` in this process."""
    with LLM.from_engine(case.engine()) as llm:

        def run(prompts: list[list[int]]) -> None:
            llm.generate(prompts, params())

        yield run, os.getpid()


@contextmanager
def through_async(case: Case) -> Iterator[tuple[Run, int]]:
    """``AsyncLLM`` in this process."""
    llm = AsyncLLM.from_engine(case.engine())

    async def stream(prompt: list[int]) -> None:
        async for _ in llm.generate(prompt, params(), output_kind="delta"):
            pass

    async def run_all(prompts: list[list[int]]) -> None:
        await asyncio.gather(*map(stream, prompts))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            yield lambda prompts: runner.run(run_all(prompts)), os.getpid()
        finally:
            llm.shutdown()


@contextmanager
def through_http(case: Case) -> Iterator[tuple[Run, int]]:
    """A server in another process, or in that and so many more."""
    options = ["--api-processes", str(case.processes)] if case.processes else []
    source = _SERVER.format(**asdict(case), options=options)
    command = [sys.executable, "-c", source]
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
    }
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            address = announced(process)
            # The server must not wait for somebody to read its log.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with clients(address, case.clients) as run:
                yield run, process.pid
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def clients(address: tuple[str, int], count: int) -> Iterator[Run]:
    """So many processes that share the streams of a run."""
    pipes = [_SPAWN.Pipe() for _ in range(count)]
    readers = [_SPAWN.Process(target=_read, args=(there, address)) for _, there in pipes]
    for reader in readers:
        reader.start()

    def run(prompts: list[list[int]]) -> None:
        for index, (pipe, _) in enumerate(pipes):
            pipe.send(prompts[index::count])
        _client_seconds[:] = [pipe.recv() for pipe, _ in pipes]

    try:
        yield run
    finally:
        for (pipe, _), reader in zip(pipes, readers, strict=True):
            pipe.send(None)
            reader.join()


def _read(pipe: Any, address: tuple[str, int]) -> None:  # noqa: ANN401 - its class is private
    """A client; tells what processor time each of its runs took."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        while (prompts := pipe.recv()) is not None:
            began = time.process_time()
            runner.run(served(address, prompts, TOKENS))
            pipe.send(time.process_time() - began)


def cpu_us(pid: int) -> dict[int, float]:
    """Processor time of all threads of a process, and of each of its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {each: _cpu_us(each) for each in (pid, *map(int, children))}


def _cpu_us(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text().split()[0]) for t in threads) / 1000


def measure(layer: str, case: Case) -> Figure:
    """Microseconds a token, in this process and its children."""
    layers: dict[str, Callable[[Case], AbstractContextManager[tuple[Run, int]]]] = {
        "loop": loop,
        "async": through_async,
        "http": through_http,
        "split": through_http,
    }
    if layer != "split":
        case = replace(case, processes=0)
    rng = random.Random(0)
    prompts = [[rng.randrange(60) for _ in range(_PROMPT_TOKENS)] for _ in range(case.streams)]
    repeats = max(1, LEAST_TOKENS // (case.streams * TOKENS))
    with layers[layer](case) as (run, pid):
        run(prompts)
        read = [0.0] * len(_client_seconds)
        before, wall = cpu_us(pid), time.perf_counter()
        for _ in range(repeats):
            run(prompts)
            read = [sum(each) for each in zip(read, _client_seconds, strict=True)]
        wall, after = (time.perf_counter() - wall) * 1e6, cpu_us(pid)
    total = repeats * case.streams * TOKENS
    used = [(after[each] - before.get(each, 0)) / total for each in after]
    client = max(read, default=0.0) * 1e6 / total
    return {"cpu_us": sum(used), "most_us": max(used), "wall_us": wall / total, "client_us": client}


def measure_tree(source: str | None, layer: str, case: Case) -> Figure:
    """The same in a fresh process, with the package of a tree (None: the one of this process)."""
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = str(Path(source).resolve())
    command = [sys.executable, __file__, "--measure", layer, json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    figure: Figure = json.loads(done.stdout)
    return figure


def measure_all(
    trees: dict[str, str | None], options: argparse.Namespace
) -> dict[str, list[Figure]]:
    """The figures of every round, by ``tree layer streams``."""
    figures: dict[str, list[Figure]] = {}
    for number in range(options.rounds):
        for layer, streams, tree in itertools.product(options.layer, options.streams, trees):
            case = Case(
                streams,
                options.processes,
                options.clients,
                options.checked,
                options.step_ms / 1000,
            )
            figure = measure_tree(trees[tree], layer, case)
            figures.setdefault(f"{tree} {layer} {streams}", []).append(figure)
            shown = ", ".join(f"{name} {value:.1f}" for name, value in figure.items())
            print(f"round {number + 1}: {tree} {layer} {streams}: {shown}", flush=True)
    return figures


def main() -> None:
    """Run, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=SRC")
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=LAYERS)
    parser.add_argument("--streams", nargs="+", type=int, default=STREAMS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--checked", action="store_true")
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("LAYER", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Case(**json.loads(options.measure[1])))))
        return
    trees = dict(tree.split("=", 1) for tree in options.tree) or {"here": None}
    figures = measure_all(trees, options)
    medians = {
        key: {name: statistics.median(f[name] for f in rounds) for name in rounds[0]}
        for key, rounds in figures.items()
    }
    print(f"\n{'microseconds a token':24}{'cpu':>8}{'most':>8}{'wall':>8}{'client':>8}")
    for key, median in medians.items():
        print(f"{key:24}" + "".join(f"{value:8.1f}" for value in median.values()))
    if options.json:
        report = {"cpu": cpu_name(), "tokens": TOKENS, "medians": medians, "rounds": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
