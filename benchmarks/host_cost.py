"""What a token costs the host beside the device: the loop, AsyncLLM, and the HTTP server.

    python benchmarks/host_cost.py --json benchmarks/results/host_cost.json
    python benchmarks/host_cost.py --tree old=../before/src --tree new=src

The device is the counting model, which has no weights, so all that is measured is scheduling,
batches, sampling's bookkeeping, text and transport (and a few microseconds of the counting model
itself). Streams run greedily, all at once:

    loop   through ``LLM.generate``: one thread, nothing in between
    async  through ``AsyncLLM``, one task a stream, text as it is made
    http   from a real server in a process of its own, over one connection a stream
    split  from one whose requests are answered by ``--processes`` before the one with the engine

Every figure comes from a fresh process that runs once to warm up. In every round all trees, layers
and numbers of streams take turns; reported are the medians over rounds, in microseconds a token:
``cpu``, the processor time of all threads of the processes (Linux only), ``most``, that of the
busiest of them, which bounds what they can do with a core each, and ``wall``, from the first
request to the last token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
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
from functools import partial
from pathlib import Path

import uvloop
from cpu_peers import cpu_name
from server_overhead import announced, served

from slipstream import LLM, AsyncLLM, SamplingParams
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.testing import counting_engine

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

command.load_model = lambda model, runtime: engine_of({streams})
command.serve.main(["counting", "--port", "0", *{options}])
"""
Figure = dict[str, float]
Run = Callable[[list[list[int]]], None]


def engine_of(streams: int) -> LoadedEngine:
    """A counting model that runs so many streams at once."""
    pages = streams * (-(-(_PROMPT_TOKENS + TOKENS) // _PAGE_SIZE) + 1)
    tokens = max(512, streams)
    return counting_engine(
        pages, page_size=_PAGE_SIZE, max_batch_size=streams, max_num_tokens=tokens
    )


def params() -> SamplingParams:
    """Greedy, to the last token."""
    return SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


@contextmanager
def loop(streams: int) -> Iterator[tuple[Run, int]]:
    """``LLM`` in this process."""
    with LLM.from_engine(engine_of(streams)) as llm:

        def run(prompts: list[list[int]]) -> None:
            llm.generate(prompts, params())

        yield run, os.getpid()


@contextmanager
def through_async(streams: int) -> Iterator[tuple[Run, int]]:
    """``AsyncLLM`` in this process."""
    llm = AsyncLLM.from_engine(engine_of(streams))

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
def through_http(streams: int, processes: int = 0) -> Iterator[tuple[Run, int]]:
    """A server in another process, or in that and so many more."""
    options = ["--api-processes", str(processes)] if processes else []
    command = [sys.executable, "-c", _SERVER.format(streams=streams, options=options)]
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
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

                def run(prompts: list[list[int]]) -> None:
                    runner.run(served(address, prompts, TOKENS))

                yield run, process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def cpu_us(pid: int) -> dict[int, float]:
    """Processor time of all threads of a process, and of each of its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {each: _cpu_us(each) for each in (pid, *map(int, children))}


def _cpu_us(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text().split()[0]) for t in threads) / 1000


def measure(layer: str, streams: int, processes: int) -> Figure:
    """Microseconds a token, in this process and its children."""
    layers: dict[str, Callable[[int], AbstractContextManager[tuple[Run, int]]]] = {
        "loop": loop,
        "async": through_async,
        "http": through_http,
        "split": partial(through_http, processes=processes),
    }
    rng = random.Random(0)
    prompts = [[rng.randrange(60) for _ in range(_PROMPT_TOKENS)] for _ in range(streams)]
    repeats = max(1, LEAST_TOKENS // (streams * TOKENS))
    with layers[layer](streams) as (run, pid):
        run(prompts)
        before, wall = cpu_us(pid), time.perf_counter()
        for _ in range(repeats):
            run(prompts)
        wall, after = (time.perf_counter() - wall) * 1e6, cpu_us(pid)
    total = repeats * streams * TOKENS
    used = [(after[each] - before.get(each, 0)) / total for each in after]
    return {"cpu_us": sum(used), "most_us": max(used), "wall_us": wall / total}


def measure_tree(source: str | None, layer: str, streams: int, processes: int) -> Figure:
    """The same in a fresh process, with the package of a tree (None: the one of this process)."""
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = str(Path(source).resolve())
    command = [sys.executable, __file__, "--measure", layer, str(streams)]
    command += ["--processes", str(processes)]
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
            figure = measure_tree(trees[tree], layer, streams, options.processes)
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("LAYER", "STREAMS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]), options.processes)))
        return
    trees = dict(tree.split("=", 1) for tree in options.tree) or {"here": None}
    figures = measure_all(trees, options)
    medians = {
        key: {name: statistics.median(f[name] for f in rounds) for name in rounds[0]}
        for key, rounds in figures.items()
    }
    print(f"\n{'microseconds a token':24}{'cpu':>8}{'most':>8}{'wall':>8}")
    for key, median in medians.items():
        print(f"{key:24}{median['cpu_us']:8.1f}{median['most_us']:8.1f}{median['wall_us']:8.1f}")
    if options.json:
        report = {"cpu": cpu_name(), "tokens": TOKENS, "medians": medians, "rounds": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
