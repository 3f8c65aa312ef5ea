"""Steps with drafts on a GPU, with random weights: which drafts are right is drawn, not computed.

Such acceptance is ``synthetic``, and so is every figure made with it named: the cost of a step is
what is measured, at lengths that real proposers are known to reach.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol
from unittest.mock import patch

from gpu_drawing import draw_drafts

from slipstream.plugins.cuda.binding import Step
from slipstream.plugins.drafting.cuda import Tokens
from slipstream.plugins.sampling import Kind
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence as Running
from slipstream.runtime.engine.step import StepResult
from slipstream.runtime.executors.cuda.device import Work
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.inputs import FIRST_ROWS, NUM_DRAFTS, Shape
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.speculation.eagle3 import DeviceHeadProposer
from slipstream.runtime.speculation.lengths import Lengths
from slipstream.runtime.speculation.speculator import Speculator

OPTIONS = {
    "speculative": "eagle3",
    "num_speculative_tokens": "auto",
    "kv_cache_free_gpu_memory_fraction": 0.7,  # for the graphs of all steps
}
LENGTH = 3  # drafts
_MOST_ROWS = 448  # of a step that is measured: 256 sequences and their drafts
# The chance of each of three drafts with which a step gives so many tokens on average.
CHANCES = {"2.5": 0.6914, "3.0": 0.8105}
# Who guesses: somebody who takes no time, and the head of the engine.
PROPOSERS = ("free", "eagle3")
_NOBODY = "nobody"
_BEGUN = 8  # tokens of a request that others wait for, or less
_IDS = itertools.count(1 << 40)  # of requests, which are no others' here


class Timed(Protocol):
    """What is measured: ``gpu.Runner``."""

    def seconds(self, count: int, input_len: int, output_len: int) -> float:
        """Until all of ``count`` requests are done."""
        ...


def executor_of(loop: EngineLoop) -> CUDAExecutor:
    """The device of a loop."""
    executor = loop._engine.executor
    assert isinstance(executor, CUDAExecutor)
    return executor


class Drawn:
    """Draws, after every step has been sampled, which of its drafts are right."""

    def __init__(self, executor: CUDAExecutor, chance: float) -> None:
        self._executor, self._chance = executor, chance
        self._steps = executor.runner._step_of
        self._known: dict[Shape, Step] = {}

    def __call__(self, runner: StepRunner) -> None:
        """Enqueue the draws of a step."""
        assert runner._read is not None
        shape, step = runner._read.shape, runner._read.step
        if step is None:
            if shape not in self._known:
                self._known[shape] = self._steps(shape)
            step = self._known[shape]
        buffers = self._executor._sampler.buffers
        inputs = step.inputs
        tokens = Tokens(
            inputs["token_ids"],
            inputs["positions"],
            inputs["query_start"],
            step.token_slots,
            inputs[NUM_DRAFTS],
        )
        sampled = buffers.tokens
        draw_drafts(tokens, inputs[FIRST_ROWS], sampled, self._chance, buffers.vocab_size)


@contextmanager
def guessing(
    loop: EngineLoop, who: str, count: int, chance: float, lengths: Lengths | None = None
) -> Iterator[None]:
    """``count`` drafts a sequence and step, of which each is right with a chance if those before it
    are; by the head of the engine, whose guesses cost what they do, or for nothing. Where there are
    ``lengths``, they choose how many of them are verified."""
    speculator, executor = loop._speculator, executor_of(loop)
    assert speculator is not None
    runner, drafter = executor.runner, executor.runner._drafter
    assert drafter is not None
    draw, head, settled = Drawn(executor, chance), StepRunner.head, dict[Shape, Work]()

    def head_and_draw(self: StepRunner, padded: int, kind: Kind) -> None:
        head(self, padded, kind)
        draw(self)

    def settle(count: int) -> None:
        assert runner._read is not None
        shape, step = runner._read.shape, runner._read.step
        if step is not None:
            drafter.settle(step)
            return
        if shape not in settled:
            of = runner._step_of(shape)
            settled[shape] = executor._device.capture(lambda: drafter.settle(of))
        settled[shape]()

    computed = Speculator.computed

    def computed_of_verified(
        self: Speculator,
        plan: StepPlan,
        runs: Mapping[Running, list[int]],
        result: StepResult,
        latest: bool,
    ) -> None:
        # Draws are of what is verified: of the rest, a model of random weights says nothing.
        if plan.offered is not None:
            plan.offered = list(map(min, plan.offered, plan.drafts))
        computed(self, plan, runs, result, latest)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Speculator, "computed", computed_of_verified))
        if who == _NOBODY:
            patches.enter_context(patch.object(speculator, "_listener", None))
        else:
            patches.enter_context(patch.object(StepRunner, "head", head_and_draw))
        if who == "free":
            patches.enter_context(patch.object(runner, "guess", settle))
            free = patch.object(DeviceHeadProposer, "seconds", lambda *_: 0.0)
            patches.enter_context(free)
        patches.enter_context(patch.object(speculator, "most", count))
        patches.enter_context(patch.object(speculator, "_lengths", lengths))
        yield


def step_ms(runner: Timed, batch: int, tokens: int = 64) -> float:
    """ms in which each of a batch of requests gets a token; what is captured on the way is captured
    before."""
    for length in (tokens + 1, 1):
        runner.seconds(batch, 128, length)
    pairs = [
        runner.seconds(batch, 128, tokens + 1) - runner.seconds(batch, 128, 1) for _ in range(3)
    ]
    return statistics.median(pairs) / tokens * 1e3


def seen_length(loop: EngineLoop, before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """How often sequences had drafts since, and how many of those were right."""
    stats = loop.stats.speculation
    assert stats is not None
    return stats.num_drafts - before[0], stats.num_accepted_tokens - before[1]


def prepare(loop: EngineLoop) -> None:
    """Capture what is captured when it is first wanted, which is nothing to be timed."""
    executor = executor_of(loop)
    executor.runner.capture_decodes(executor.guess_counts, _MOST_ROWS)


def verification(runner: Timed, loop: EngineLoop) -> dict[str, float]:
    """ms of a step of 1, 2, 4 and 8 rows at batch 1 with the host, none of whose drafts is right,
    and, as the device takes them one after the other, of steps of so many rows."""
    figures: dict[str, float] = {}
    prepare(loop)
    for count in (0, 1, 3, 7):
        with guessing(loop, "free" if count else _NOBODY, count, 0.0):
            figures[f"step_1x{count + 1}"] = step_ms(runner, 1)
    seconds = executor_of(loop).step_seconds()
    figures |= {
        f"device_rows_{rows}": seconds[rows] * 1e3 for rows in (1, 2, 4, 8) if rows in seconds
    }
    return figures


def drafting(loop: EngineLoop) -> dict[str, float]:
    """ms in which the head reads a step of as many sequences and guesses so many tokens of each."""
    return {
        f"drafting_{count}_of_{sequences}": seconds * 1e3
        for (sequences, count), seconds in sorted(executor_of(loop).guess_seconds().items())
    }


def fixed_lengths(runner: Timed, loop: EngineLoop) -> dict[str, float]:
    """How much faster three drafts make a batch at lengths of 2.5 and 3, and what a step takes: the
    lengths that draws gave are no others, so what they are off counts for nothing."""
    figures: dict[str, float] = {}
    prepare(loop)
    for batch in (1, 16, 64):
        with guessing(loop, _NOBODY, 0, 0.0):
            plain = figures[f"plain_{batch}"] = step_ms(runner, batch)
        for who in PROPOSERS:
            for length, chance in CHANCES.items():
                before = seen_length(loop)
                with guessing(loop, who, LENGTH, chance):
                    rate = plain / step_ms(runner, batch, 128 if batch == 1 else 64)
                times, right = seen_length(loop, before)
                figures[f"synthetic_{who}_{batch}_at_{length}"] = (
                    rate * float(length) / (1 + right / times)
                )
    return figures


def by_load(runner: Timed, loop: EngineLoop) -> dict[str, float]:
    """The same with the number of drafts chosen by load, at a full batch too, which it must not
    make slower; as the draws came."""
    figures: dict[str, float] = {}
    speculator, executor = loop._speculator, executor_of(loop)
    assert speculator is not None
    prepare(loop)
    for batch in (1, 64, 256):
        tokens = 192 if batch == 1 else 64
        with guessing(loop, _NOBODY, 0, 0.0):
            plain = figures[f"auto_plain_{batch}"] = step_ms(runner, batch, tokens)
        for length, chance in CHANCES.items():
            with guessing(loop, "eagle3", 7, chance, Lengths(7, speculator._listener)):
                speculator.learn(executor)
                rate = plain / step_ms(runner, batch, tokens)
                figures[f"synthetic_auto_{batch}_at_{length}"] = rate
    return figures


def steady(loop: EngineLoop) -> dict[str, float]:
    """The same, of three drafts and by load, while all requests of a batch run, as where others
    come for those that end: of a batch of which each gets 64 tokens, the one with the fewest right
    drafts takes a fifth more steps than the mean."""
    figures: dict[str, float] = {}
    speculator, executor = loop._speculator, executor_of(loop)
    assert speculator is not None
    prepare(loop)
    for batch in (1, 16, 64, 256):
        with guessing(loop, _NOBODY, 0, 0.0):
            plain = figures[f"steady_plain_{batch}"] = _steady_ms(loop, batch)
        for length, chance in CHANCES.items():
            if batch < 256:
                before = seen_length(loop)
                with guessing(loop, "eagle3", LENGTH, chance):
                    rate = plain / _steady_ms(loop, batch)
                times, right = seen_length(loop, before)
                rate *= float(length) / (1 + right / times)
                figures[f"steady_eagle3_{batch}_at_{length}"] = rate
            with guessing(loop, "eagle3", 7, chance, Lengths(7, speculator._listener)):
                speculator.learn(executor)
                rate = plain / _steady_ms(loop, batch)
                figures[f"steady_auto_{batch}_at_{length}"] = rate
    return figures


def _steady_ms(loop: EngineLoop, batch: int) -> float:
    """ms in which each of a batch of requests gets a token while all of them run; what is captured
    on the way is captured before."""
    _steady_seconds(loop, batch, 16)
    steps = 192 if batch == 1 else 48
    return statistics.median(_steady_seconds(loop, batch, steps) for _ in range(3)) * 1e3


def _steady_seconds(loop: EngineLoop, count: int, steps: int, length: int = 128) -> float:
    """The same, once: over so many steps, when all have got some tokens, of answers that then
    end."""
    params = SamplingParams(temperature=0, max_tokens=8 * (steps + _BEGUN), ignore_eos=True)
    vocab = range(loop._engine.vocab_size)
    names = [str(next(_IDS)) for _ in range(count)]
    for name in names:
        prompt = random.choices(vocab, k=length)
        loop.add_request(Request(name, prompt, params, output_kind="final"))
    running = loop.scheduler.running

    def so_far() -> int:
        return sum(len(sequence.tokens) for sequence in running)

    while len(running) < count or so_far() < count * (length + _BEGUN):
        loop.step()
    executor_of(loop)._device.synchronize()
    before, started = so_far(), time.perf_counter()
    for _ in range(steps):
        loop.step()
    seconds, tokens = time.perf_counter() - started, so_far() - before
    for name in names:
        loop.abort(name)
    while loop.has_work:
        loop.step()
    return seconds * count / tokens


def table(figures: Mapping[str, float]) -> str:
    """The figures that the project has aims for, as far as they were measured, in few lines."""
    lines = ["synthetic acceptance, k = 3: times as fast     free            eagle3          auto"]
    for batch in (1, 16, 64, 256):
        cells = [f"batch {batch:<4}"]
        for kind in (*PROPOSERS, "auto"):
            found = [figures.get(f"synthetic_{kind}_{batch}_at_{each}") for each in CHANCES]
            cells.append(" / ".join("-" if each is None else f"{each:.2f}" for each in found))
        lines.append(f"{cells[0]:38}" + "".join(f"{cell:>16}" for cell in cells[1:]))
    for batch in (1, 16, 64, 256):
        cells = [f"while all of {batch} run"]
        for kind in ("eagle3", "auto"):
            found = [figures.get(f"steady_{kind}_{batch}_at_{each}") for each in CHANCES]
            cells.append(" / ".join("-" if each is None else f"{each:.2f}" for each in found))
        lines.append(f"{cells[0]:54}" + "".join(f"{cell:>16}" for cell in cells[1:]))
    for name, ours, one in (
        ("with the host", "step_1x4", "step_1x1"),
        ("on the device", "device_rows_4", "device_rows_1"),
    ):
        if ours in figures and figures.get(one):
            ratio = figures[ours] / figures[one]
            lines.append(f"4 rows / 1 row at batch 1, {name}: {ratio:.3f} ({figures[ours]:.2f} ms)")
    for name, value in figures.items():
        if name.startswith("drafting_3_of_"):
            lines.append(f"drafting of 3 tokens after a step of {name[14:]}: {value:.3f} ms")
    return "\n".join(lines)
