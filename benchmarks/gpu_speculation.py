"""Steps with drafts on a GPU, with random weights: which drafts are right is drawn, not computed.

Such acceptance is ``synthetic``, and so is every figure made with it named: the cost of a step is
what is measured, at lengths that real proposers are known to reach.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from unittest.mock import patch

from slipstream.runtime.engine.plan import MAX_STEP_DRAFTS
from slipstream.runtime.engine.step import REJECTED, SamplingRow, StepResult
from slipstream.runtime.executors.cuda import pending
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.speculation import proposer
from slipstream.runtime.speculation.lengths import Lengths
from slipstream.runtime.speculation.proposer import Context

NAME = "synthetic"
OPTIONS = {"speculative": NAME, "num_speculative_tokens": 7}
proposer._PROPOSERS[NAME] = f"{__name__}:SyntheticProposer"
# The chance of each of three drafts with which a step gives so many tokens on average.
CHANCES = {"2.5": 0.6914, "3.0": 0.8105}


class SyntheticProposer:
    """Guesses as many tokens as it is told to, none at first."""

    most = 0

    def __init__(self, engine: LoadedEngine) -> None:
        self._vocab_size = engine.vocab_size

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
def guessing(count: int, chance: float) -> Iterator[None]:
    """``count`` drafts a sequence and step, of which each is right with a chance if those before it
    are."""
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
        patch.object(pending, "reject", reject),
    ):
        yield


def step_ms(runner: Timed, batch: int, tokens: int = 128) -> float:
    """ms in which each of a batch of requests gets a token."""
    runner.seconds(batch, 128, 16)
    pairs = [
        runner.seconds(batch, 128, tokens + 1) - runner.seconds(batch, 128, 1) for _ in range(3)
    ]
    return statistics.median(pairs) / tokens * 1e3


def speculation(runner: Timed) -> dict[str, float]:
    """ms of a step of 1, 2, 4 and 8 rows a sequence at batch 1, 16 and 64, and how much faster
    three drafts make a batch at lengths of 2.5 and 3."""
    figures: dict[str, float] = {}
    for batch in (1, 16, 64):
        for count in (0, 1, 3, 7):
            if batch * count <= MAX_STEP_DRAFTS:
                with guessing(count, 0.0):
                    figures[f"step_{batch}x{count + 1}"] = step_ms(runner, batch)
        for length, chance in CHANCES.items():
            with guessing(3, chance):
                rate = figures[f"step_{batch}x1"] / step_ms(runner, batch)
            figures[f"synthetic_speedup_{batch}_at_{length}"] = rate
    return figures


def by_load(runner: Timed, loop: object) -> dict[str, float]:
    """The same with the number of drafts chosen by load, at a full batch too, which it must not
    make slower."""
    figures: dict[str, float] = {}
    speculator = loop._speculator  # type: ignore[attr-defined]
    for batch in (1, 64, 256):
        with guessing(0, 0.0):
            plain = step_ms(runner, batch)
        for length, chance in CHANCES.items():
            with patch.object(speculator, "_lengths", Lengths(7)), guessing(7, chance):
                speculator.learn(loop._engine.executor)  # type: ignore[attr-defined]
                figures[f"synthetic_auto_{batch}_at_{length}"] = plain / step_ms(runner, batch)
    return figures
