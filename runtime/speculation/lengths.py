"""How many drafts of a step pay, by how often they were right and what steps have cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_SMOOTHING = 0.25  # the weight of the newest step
_OUTLIER = 2.0  # times what was expected: what is more than that is not of the step's doing
_CLOSE = 8  # a number of rows is known where one is that differs by an eighth
_MARGIN = 1.03  # of expected tokens a second, below which nothing is gained for sure
_REMEMBERED = 256  # steps after which a cost is measured again


class StepCosts:
    """Seconds of a step of decodes by its number of rows, as they were measured of late.

    A number of rows that no step had for a while is forgotten, and so tried again where it may pay:
    machines get other work, and contexts grow.
    """

    def __init__(self) -> None:
        self._measured: dict[int, tuple[float, int]] = {}  # and in which step
        self._steps = 0
        self._places: list[int] = []
        self._seconds: list[float] = []

    def add(self, rows: int, seconds: float) -> None:
        """Take a step into account."""
        self._steps += 1
        if rows in self._measured:
            known, _ = self._measured[rows]
            seconds = known + _SMOOTHING * (min(seconds, _OUTLIER * known) - known)
        self._measured[rows] = seconds, self._steps
        oldest = self._steps - _REMEMBERED
        kept = {rows: each for rows, each in self._measured.items() if each[1] > oldest}
        self._measured, self._places = kept, sorted(kept)
        # More rows cost no less: what says otherwise was disturbed.
        falling = accumulate((kept[place][0] for place in reversed(self._places)), min)
        self._seconds = list(falling)[::-1]

    def knows(self, rows: int) -> bool:
        """Whether a step of about so many rows was measured."""
        index = bisect_left(self._places, rows - rows // _CLOSE)
        return index < len(self._places) and self._places[index] <= rows + rows // _CLOSE

    @property
    def most(self) -> int:
        """The most rows whose cost can be told: twice what was measured."""
        return 2 * self._places[-1] if self._places else 0

    def seconds(self, rows: int) -> float:
        """Between two numbers of rows that are known, in proportion; beyond, as from the first to
        the last. More rows than the only number that is known cost nothing, so that it is tried."""
        places, seconds = self._places, self._seconds
        index = bisect_left(places, rows)
        if index == len(places):
            slope = (seconds[-1] - seconds[0]) / max(1, places[-1] - places[0])
            return seconds[-1] + slope * (rows - places[-1])
        if index == 0 or places[index] == rows:
            return seconds[index]
        low, high = places[index - 1], places[index]
        part = (rows - low) / (high - low)
        return (1 - part) * seconds[index - 1] + part * seconds[index]


class Lengths:
    """Chooses what gives the most tokens a second, nothing included."""

    def __init__(self) -> None:
        self._costs = StepCosts()

    def choose(
        self, num_sequences: int, chances: Sequence[float], offered: Sequence[int], most: int
    ) -> list[int]:
        """How many of the ``offered`` drafts of some of a step's sequences to verify, ``most`` in
        all; each is right with the chance of its sequence if those before it are."""
        lengths, costs = [0] * len(offered), self._costs
        if not any(offered) or not costs.knows(num_sequences):  # what none cost is measured first
            return lengths
        ranked = _ranked(chances, offered)[: min(most, costs.most - num_sequences)]
        best, count = _MARGIN * num_sequences / costs.seconds(num_sequences), 0
        for size, gain in enumerate(accumulate(gain for gain, _ in ranked), start=1):
            rate = (num_sequences + gain) / costs.seconds(num_sequences + size)
            if rate > best:
                best, count = rate, size
        for _, index in ranked[:count]:
            lengths[index] += 1
        return lengths

    def landed(self, rows: int, seconds: float) -> None:
        """Take a step of nothing but decodes into account."""
        self._costs.add(rows, seconds)


def _ranked(chances: Sequence[float], offered: Sequence[int]) -> list[tuple[float, int]]:
    """How much every draft adds to the tokens that are expected, and whose it is, the most first;
    those of a sequence in their order."""
    ranked = []
    for index, (chance, count) in enumerate(zip(chances, offered, strict=True)):
        gain = 1.0
        for _ in range(count):
            gain *= chance
            ranked.append((gain, index))
    ranked.sort(key=lambda each: -each[0])
    return ranked
