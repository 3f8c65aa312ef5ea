"""Steps with drafts on a GPU, with random weights: which drafts are right is drawn, not computed.

Such acceptance is ``synthetic``, and so is every figure made with it named: the cost of a step is
what is measured, at lengths that real proposers are known to reach.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol
from unittest.mock import patch

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepResult
from slipstream.runtime.executors.cuda import pending
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.speculation.lengths import Lengths
from slipstream.runtime.speculation.proposer import Context

OPTIONS = {
    "speculative": "eagle3",
    "num_speculative_tokens": "auto",
    "kv_cache_free_gpu_memory_fraction": 0.7,  # for the graphs of all steps
}
LENGTH = 3  # drafts
_MOST_ROWS = 448  # of a step that is measured: 256 sequences and their drafts
# The chance of each of three drafts with which a step gives so many tokens on average.
CHANCES = {"2.5": 0.6914, "3.0": 0.8105}
# Who guesses: nobody, somebody who takes no time, and the head of the engine.
PROPOSERS = ("free", "eagle3")


class SyntheticProposer:
    """Guesses as many tokens as it is told to, none at first."""

    most = 0

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        """Some tokens that are not too alike."""
        count = min(most, self.most)
        return [
            [(context.tokens[-1] + 7 * i + 1) % self._vocab_size for i in range(count)]
            for context in contexts
        ]

    def finish(self, context: Context) -> None:
        """Nothing is kept."""


class Timed(Protocol):
    """What is measured: ``gpu.Runner``."""

    def seconds(self, count: int, input_len: int, output_len: int) -> float:
        """Until all of ``count`` requests are done."""
        ...


@contextmanager
def guessing(
    loop: EngineLoop, who: str, count: int, chance: float, lengths: Lengths | None = None
) -> Iterator[None]:
    """``count`` drafts a sequence and step, of which each is right with a chance if those before it
    are; by the head of the engine, whose guesses cost what they do, or for nothing. Where there are
    ``lengths``, they choose how many of them are verified."""
    speculator = loop._speculator
    assert speculator is not None
    free = SyntheticProposer(loop._engine.vocab_size)
    proposer = speculator._proposer if who == "eagle3" else free
    drawn = random.Random(0)

    def reject(rows: Sequence[SamplingRow], result: StepResult) -> None:
        tokens = result.token_ids
        for index, row in enumerate(rows):
            if row.drafts and tokens[index - 1] != REJECTED and drawn.random() < chance:
                tokens[index - 1] = row.drafts[-1]
            elif row.drafts:
                tokens[index] = REJECTED

    with (
        patch.object(SyntheticProposer, "most", count),
        patch.object(speculator, "_proposer", proposer),
        patch.object(speculator, "_listener", proposer if who == "eagle3" else None),
        patch.object(speculator, "_most", count),
        patch.object(speculator, "_lengths", lengths),
        patch.object(pending, "reject", reject),
    ):
        yield


def step_ms(runner: Timed, batch: int, tokens: int = 64) -> float:
    """ms in which each of a batch of requests gets a token."""
    runner.seconds(batch, 128, 16)
    pairs = [
        runner.seconds(batch, 128, tokens + 1) - runner.seconds(batch, 128, 1) for _ in range(2)
    ]
    return statistics.mean(pairs) / tokens * 1e3


def prepare(loop: EngineLoop) -> None:
    """Capture what is captured when it is first wanted, which is nothing to be timed."""
    executor = loop._engine.executor
    assert isinstance(executor, CUDAExecutor)
    executor.runner.capture_decodes(executor.guess_counts, _MOST_ROWS)


def verification(runner: Timed, loop: EngineLoop) -> dict[str, float]:
    """ms of a step of 1, 2, 4 and 8 rows at batch 1 with the host, none of whose drafts is right,
    and, as the device takes them one after the other, of steps of so many rows."""
    figures: dict[str, float] = {}
    prepare(loop)
    for count in (0, 1, 3, 7):
        with guessing(loop, "free", count, 0.0):
            figures[f"step_1x{count + 1}"] = step_ms(runner, 1)
    executor = loop._engine.executor
    assert isinstance(executor, CUDAExecutor)
    seconds = executor.step_seconds()
    figures |= {
        f"device_rows_{rows}": seconds[rows] * 1e3 for rows in (1, 2, 4, 8) if rows in seconds
    }
    return figures


def drafting(loop: EngineLoop) -> dict[str, float]:
    """ms in which the head reads a step of as many sequences and guesses so many tokens of each."""
    executor = loop._engine.executor
    assert isinstance(executor, CUDAExecutor)
    return {
        f"drafting_{count}_of_{sequences}": seconds * 1e3
        for (sequences, count), seconds in sorted(executor.guess_seconds().items())
    }


def fixed_lengths(runner: Timed, loop: EngineLoop) -> dict[str, float]:
    """How much faster three drafts make a batch at lengths of 2.5 and 3, and what a step takes."""
    figures: dict[str, float] = {}
    prepare(loop)
    for batch in (1, 16, 64):
        with guessing(loop, "free", 0, 0.0):
            plain = figures[f"plain_{batch}"] = step_ms(runner, batch)
        for who in PROPOSERS:
            for length, chance in CHANCES.items():
                with guessing(loop, who, LENGTH, chance):
                    rate = plain / step_ms(runner, batch)
                figures[f"synthetic_{who}_{batch}_at_{length}"] = rate
    return figures


def by_load(runner: Timed, loop: EngineLoop) -> dict[str, float]:
    """The same with the number of drafts chosen by load, at a full batch too, which it must not
    make slower."""
    figures: dict[str, float] = {}
    speculator, executor = loop._speculator, loop._engine.executor
    assert speculator is not None
    prepare(loop)
    for batch in (1, 64, 256):
        with guessing(loop, "free", 0, 0.0):
            plain = figures[f"auto_plain_{batch}"] = step_ms(runner, batch, 64)
        for length, chance in CHANCES.items():
            with guessing(loop, "eagle3", 7, chance, Lengths(7)):
                speculator.learn(executor)
                figures[f"synthetic_auto_{batch}_at_{length}"] = plain / step_ms(runner, batch, 64)
    return figures


def table(figures: Mapping[str, float]) -> str:
    """The figures that the project has aims for, as far as they were measured, in few lines."""
    lines = ["synthetic acceptance, k = 3: times as fast     free            eagle3          auto"]
    for batch in (1, 16, 64, 256):
        cells = [f"batch {batch:<4}"]
        for kind in (*PROPOSERS, "auto"):
            found = [figures.get(f"synthetic_{kind}_{batch}_at_{each}") for each in CHANCES]
            cells.append(" / ".join("-" if each is None else f"{each:.2f}" for each in found))
        lines.append(f"{cells[0]:38}" + "".join(f"{cell:>16}" for cell in cells[1:]))
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
