"""How many drafts of a step pay, by how often they were right and what steps have cost."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

_SMOOTHING = 0.25  # the weight of the newest step
_OUTLIER = 2.0  # times what was expected: what is more than that is not of the step's doing
_EXACT = 16  # so many rows are told apart; of more, an eighth
_MARGIN = 1.03  # of expected tokens a second, below which nothing is gained for sure
_REFRESH = 64  # drafting steps between two without drafts, which say what those would cost
_PROBE_SHARE = 0.02  # of the time, for drafts that are not expected to pay
_LEAST_PROBE = 0.1  # of a step: what a probe takes at least, as far as anyone knows


class StepCosts:
    """Seconds of a step of decodes by its number of rows, as they were measured of late."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._known: list[int] = []

    def add(self, rows: int, seconds: float) -> None:
        """Take a step into account."""
        place = bucket(rows)
        if place not in self._seconds:
            insort(self._known, place)
            self._seconds[place] = seconds
            return
        known = self._seconds[place]
        self._seconds[place] += _SMOOTHING * (min(seconds, _OUTLIER * known) - known)

    def knows(self, rows: int) -> bool:
        """Whether a step of about so many rows was measured."""
        return bucket(rows) in self._seconds

    def seconds(self, rows: int) -> float:
        """Between two numbers of rows that are known, in proportion; beyond, as the nearest: what
        costs nothing is tried, and then known."""
        place, known = bucket(rows), self._known
        index = bisect_left(known, place)
        if index == len(known):
            return self._seconds[known[-1]]
        high = known[index]
        if high == place or index == 0:
            return self._seconds[high]
        low = known[index - 1]
        part = (place - low) / (high - low)
        return (1 - part) * self._seconds[low] + part * self._seconds[high]


class Lengths:
    """Chooses what gives the most tokens a second, nothing included."""

    def __init__(self) -> None:
        self._costs = StepCosts()
        self._since: Counter[int] = Counter()  # drafting steps since one without, by sequences
        self._credit = 0.0

    def choose(
        self, num_sequences: int, chances: Sequence[float], offered: Sequence[int], most: int
    ) -> list[int]:
        """How many of the ``offered`` drafts of some of a step's sequences to verify, ``most`` in
        all; each is right with the chance of its sequence if those before it are."""
        lengths = [0] * len(offered)
        if not self._costs.knows(num_sequences) or not any(offered):
            return lengths
        ranked = _ranked(chances, offered)[:most]
        for _, index in ranked[: self._count(num_sequences, [gain for gain, _ in ranked])]:
            lengths[index] += 1
        return lengths

    def landed(self, num_sequences: int, rows: int, seconds: float) -> None:
        """Take a step of nothing but decodes into account."""
        place = bucket(num_sequences)
        self._since[place] = self._since[place] + 1 if rows > num_sequences else 0
        self._costs.add(rows, seconds)
        limit = _PROBE_SHARE * _REFRESH * seconds
        self._credit = min(self._credit + _PROBE_SHARE * seconds, limit)

    def _count(self, num_sequences: int, gains: Sequence[float]) -> int:
        plain = self._costs.seconds(num_sequences)
        rates = [
            (num_sequences + gain) / self._costs.seconds(num_sequences + count)
            for count, gain in enumerate(accumulate(gains), start=1)
        ]
        if not rates:
            return 0
        best = max(rates)
        count = 1 + rates.index(best)
        if best > _MARGIN * num_sequences / plain:
            return count if self._since[bucket(num_sequences)] < _REFRESH else 0
        more = self._costs.seconds(num_sequences + count) - plain
        price = max(more, _LEAST_PROBE * plain)
        if price > self._credit:
            return 0
        self._credit -= price
        return count


def bucket(rows: int) -> int:
    """The number that stands for ``rows`` and those close to it."""
    shift = max(0, rows.bit_length() - _EXACT.bit_length() + 1) if rows > _EXACT else 0
    return rows >> shift << shift


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
