"""How many drafts of a copy of code are verified, by counted work: replays of what a model would
say, on devices whose steps cost what the tests say."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from slipstream.runtime.speculation.lengths import Lengths
from slipstream.runtime.speculation.lookup import OwnText
from slipstream.runtime.speculation.proposer import Context
from slipstream.runtime.speculation.tracked import FIRST_CHANCE, Tracked

TEXT = Path(__file__).parents[3] / "quantize" / "texts" / "evaluation_code.txt"
NAME = r"\b[a-z_]{3,}\b"
MOST = 7
# Times a step of one row, a row: from little, as on a GPU, to what two busy cores took.
A_ROW = [0.02, 0.1, 0.18, 0.3]
# What SmolLM2 took on one core with AVX2, in ms: no straight line.
MEASURED = {1: 9.75, 2: 10.9, 3: 13.6, 4: 15.2, 5: 18.5, 6: 20.7, 7: 26.5, 8: 29.8}
Cost = Callable[[int], float]


def of_rows(each: float) -> Cost:
    """What a step takes whose rows after the first cost so much."""
    return lambda rows: 1 + each * (rows - 1)


COSTS = {str(each): of_rows(each) for each in A_ROW}
COSTS["measured"] = lambda rows: MEASURED[rows] / MEASURED[1]


@cache
def edits(count: int = 5) -> list[tuple[list[int], list[int]]]:
    """Files and copies of them, in which every fifth name is another and a line in nine is gone."""
    files, ids = TEXT.read_text(encoding="utf-8"), dict[str, int]()
    size, pairs = len(files) // count, []
    for index in range(count):
        cut = files[index * size : index * size + 1200]
        names = sorted(set(re.findall(NAME, cut)))[::5]
        lines = [line for place, line in enumerate(cut.splitlines(True)) if place % 9 != 8]
        copy = re.sub("|".join(rf"\b{name}\b" for name in names), r"\g<0>_b", "".join(lines))
        texts = (re.findall(r"[a-z]+|[ ]+|.", text, re.DOTALL) for text in (cut, copy))
        prompt, answer = ([ids.setdefault(each, len(ids)) for each in text] for text in texts)
        pairs.append((prompt, answer[:200]))
    return pairs


@cache
def replay(cost: Cost, fixed: int | None = None, first: float = 1.0) -> float:
    """Tokens in the time of a step of one row; the ``first`` step of a number of rows seems to take
    so many times as long."""
    lengths, seen, seconds, tokens = Lengths(MOST), set[int](), 0.0, 0
    for prompt, answer in edits():
        said, text = [*prompt, answer[0]], OwnText()
        tracked = Tracked(Context(said, len(prompt)), FIRST_CHANCE)
        while left := answer[len(said) - len(prompt) :]:
            tracked.compare(said[tracked.guessed_at :][: len(tracked.guess)])
            tracked.guess, tracked.guessed_at = text.propose(said, MOST)[: len(left) - 1], len(said)
            offered = len(tracked.guess)
            chosen = lengths.choose(1, [tracked.chance], [offered], MOST)[0]
            count = chosen if fixed is None else min(fixed, offered)
            drafts = tracked.guess[:count]
            right = next((i for i in range(count) if drafts[i] != left[i]), count)
            said += left[: right + 1]
            rows = 1 + count
            lengths.landed(rows, cost(rows) * (1 if rows in seen else first))
            seen.add(rows)
            seconds += cost(rows)
            tokens += right + 1
    return tokens / seconds


@pytest.mark.parametrize("first", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", COSTS)
def test_load_chooses_as_well_as_the_best_length_there_is(name: str, first: float) -> None:
    """Which is another one for every cost of a row; what there is to learn takes some steps."""
    best = max(replay(COSTS[name], fixed) for fixed in range(MOST + 1))
    assert replay(COSTS[name], first=first) > 0.96 * best
