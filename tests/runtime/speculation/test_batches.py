"""How many guesses of a head are asked for and verified, of batches of which they are right by
chance, on a device whose steps cost what one H200 took (8B, fp8)."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from slipstream.runtime.speculation.lengths import Lengths
from slipstream.runtime.speculation.ngram import NgramProposer
from slipstream.runtime.speculation.proposer import Context, Guessed
from slipstream.runtime.speculation.tracked import (
    FIRST_CHANCE,
    OF_LOOKUPS,
    OF_MODELS,
    Tracked,
    weight_of,
)
from slipstream.runtime.testing import counting_engine

# ms of steps by their rows, and of guesses, by sequences.
STEPS = {
    1: {1: 2.61, 2: 2.85, 4: 2.88, 8: 2.95},
    16: {16: 2.92, 32: 3.15, 64: 3.49, 128: 4.0},
    64: {64: 3.87, 128: 4.5, 192: 5.1, 256: 5.67},
}
GUESSES = {
    1: {0: 0.09, 1: 0.14, 3: 0.40, 7: 0.92},
    16: {0: 0.12, 1: 0.18, 3: 0.46, 7: 1.01},
    64: {0: 0.16, 1: 0.21, 3: 0.55, 7: 1.19},
}
MOST = 192  # drafts of a step


class Head:
    """One that guesses on the device."""

    counts: Sequence[int] = (1, 3, 7)

    def __init__(self, size: int) -> None:
        self._ms = GUESSES[size]

    def heard(self, guesses: Sequence[Guessed]) -> None:
        raise AssertionError

    def seconds(self, num_sequences: int, count: int) -> float:
        return self._ms[0 if not count else self.made(count)] / 1e3

    def made(self, count: int) -> int:
        """How many guesses it makes where so many are wanted."""
        return self.counts[bisect_left(self.counts, count)] if count else 0


@cache
def rate(size: int, chance: float, fixed: int | None = None) -> float:
    """Tokens a ms of a batch; the host learns of a step when the next one is on its way."""
    drawn, head = random.Random(1), Head(size)
    lengths = Lengths(7, head)
    for rows, ms in STEPS[size].items():
        lengths.landed(rows, ms / 1e3, sure=True)
    tracked = [Tracked(Context((), 0), FIRST_CHANCE, OF_MODELS) for _ in range(size)]
    tokens, taken, offered, late = 0, 0.0, 0, list[tuple[int, bool]]()
    for _ in range(max(150, 4000 // size)):
        left, counts = MOST, [min(fixed or 0, offered)] * size
        if fixed is None:
            counts = lengths.choose(size, [each.chance for each in tracked], [offered] * size, left)
        came = []
        for count in counts:
            count, left = min(count, left), left - min(count, left)
            right = next((i for i in range(count) if drawn.random() > chance), count)
            came.append((right, right < count))
            tokens += right + 1
        for each, (right, wrong) in zip(tracked, late, strict=False):
            each.note(right, wrong)
        late, rows = came, size + MOST - left
        places = list(STEPS[size])
        ms = STEPS[size][places[bisect_left(places, rows)]]
        lengths.landed(rows, ms / 1e3)
        offered = head.made(lengths.wanted() if fixed is None else fixed)
        taken += ms + head.seconds(size, offered) * 1e3
    return tokens / taken


@pytest.mark.parametrize("chance", [0.69, 0.81])
@pytest.mark.parametrize("size", STEPS)
def test_load_chooses_as_well_as_the_best_length_there_is(size: int, chance: float) -> None:
    """Though each sequence seems, by luck, to be guessed better or worse."""
    best = max(rate(size, chance, fixed) for fixed in (1, 3, 7))
    assert rate(size, chance) > 0.97 * best


def test_a_head_is_a_model_and_a_lookup_is_none() -> None:
    head: Any = Head(1)
    assert weight_of(head) == OF_MODELS
    assert weight_of(NgramProposer(counting_engine())) == OF_LOOKUPS
