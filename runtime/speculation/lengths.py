"""How many drafts of a step pay, by how often they were right and what steps have cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.speculation.proposer import Listener

_SMOOTHING = 0.25  # the weight of the newest step
_OUTLIER = 2.0  # times what was expected: what is more than that is not of the step's doing
_ODD = 1.25  # times what was expected: what a first step may take to be believed
_CLOSE = 8  # a number of rows is known where one is that differs by an eighth
_MARGIN = 1.03  # of expected tokens a second, below which nothing is gained for sure
_REMEMBERED = 256  # steps after which a cost is measured again
_FREE = 0.02  # of the time: what a proposer may take for nothing


class StepCosts:
    """Seconds of a step of decodes by its number of rows, as they were measured of late.

    Where the first step of a number of rows takes more than was expected, the quicker of two
    counts: it may have made room for arrays of a new shape, or something else kept the machine
    busy, and what looks dear is not tried again for long. One that no step had for a while is
    forgotten, and so tried again where it may pay: machines get other work, and contexts grow.
    """

    def __init__(self) -> None:
        self._measured: dict[int, tuple[float, int]] = {}  # and in which step
        self._once: dict[int, tuple[float, int]] = {}
        self._steps = 0
        self._places: list[int] = []
        self._seconds: list[float] = []

    def add(self, rows: int, seconds: float, sure: bool = False) -> None:
        """Take a step into account, or what was measured with care, which is ``sure``."""
        self._steps += 1
        oldest = self._steps - _REMEMBERED
        if rows in self._measured:
            known, _ = self._measured[rows]
            seconds = known + _SMOOTHING * (min(seconds, _OUTLIER * known) - known)
        first, when = self._once.pop(rows, (seconds, oldest))
        expected = _ODD * self.seconds(rows) if self._places else 0.0
        if sure or rows in self._measured or when > oldest or seconds <= expected:
            self._measured[rows] = min(first, seconds), self._steps
        else:
            self._once[rows] = seconds, self._steps
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
        return float(self.all_seconds(np.array([rows]))[0])

    def all_seconds(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The same of many numbers of rows."""
        places, seconds = self._places, self._seconds
        slope = (seconds[-1] - seconds[0]) / max(1, places[-1] - places[0])
        beyond = np.maximum(rows - places[-1], 0)
        found: NDArray[np.float64] = np.interp(rows, places, seconds) + slope * beyond
        return found


class Lengths:
    """Chooses what gives the most tokens a second, nothing included, and for how many tokens a
    proposer is asked.

    One that takes no time worth speaking of is always asked for all it can say. Another is asked
    for one token more than was verified the last time, and while that is none ever more rarely. A
    device that guesses after the step is asked for what would pay by the chances that are known,
    whatever it has guessed before.
    """

    def __init__(self, most: int, listener: Listener | None = None) -> None:
        """``most`` tokens are asked for at most; of a device that guesses by the ``listener``."""
        self._costs = StepCosts()
        self._most = self._wanted = most
        self._listener = listener
        self._asking = 0.0  # seconds for a token of every sequence
        self._pause = self._left = 0  # steps in which nobody is asked

    def wanted(self) -> int:
        """For how many tokens of each sequence the proposer is asked before this step, or the
        device after it."""
        if self._left:
            self._left -= 1
            return 0
        return self._wanted

    def asked(self, wanted: int, seconds: float) -> None:
        """Take into account how long the proposer took for so many tokens of each sequence."""
        known = self._asking or seconds / wanted
        self._asking = known + _SMOOTHING * (seconds / wanted - known)

    def choose(
        self, num_sequences: int, chances: Sequence[float], offered: Sequence[int], most: int
    ) -> list[int]:
        """How many of the ``offered`` drafts of some of a step's sequences to verify, ``most`` in
        all; each is right with the chance of its sequence if those before it are."""
        none = [0] * len(offered)
        if not self._costs.knows(num_sequences):  # what none cost is measured first
            return none
        counts = () if self._listener is None else self._listener.counts
        if self._listener is not None and counts:
            return self._lead(self._listener, num_sequences, chances, offered, most)
        if not any(offered):
            return none
        ranked = _ranked(chances, offered)
        longest = np.maximum.accumulate(ranked.places)
        found = self._best(num_sequences, ranked, most, longest * self._asking)
        lengths = none if found is None else ranked.lengths(found[0])
        self._ask_by(max(lengths), self._costs.seconds(num_sequences))
        return lengths

    def _lead(
        self,
        listener: Listener,
        num_sequences: int,
        chances: Sequence[float],
        offered: Sequence[int],
        most: int,
    ) -> list[int]:
        """The same of drafts that a device has made, which is then asked for those that pay."""
        all_of = _ranked(chances, [self._most if chance else 0 for chance in chances])
        reading, pays, rate = listener.seconds(num_sequences, 0), 0, 0.0
        for count in (count for count in listener.counts if count <= self._most):
            asking = listener.seconds(num_sequences, count)
            found = self._best(num_sequences, all_of.up_to(count), most, asking, reading)
            if found is not None and found[1] > rate:
                pays, rate = count, found[1]
        if pays:
            self._wanted, self._pause, self._left = pays, 0, 0
        elif any(offered):
            self._wanted = min(listener.counts)
            asking = listener.seconds(num_sequences, self._wanted) - reading
            share = asking / (_FREE * self._costs.seconds(num_sequences))
            self._pause = self._left = min(2 * self._pause + 1, int(share))
        asking = listener.seconds(num_sequences, pays)  # these have been paid for
        ranked = _ranked(chances, offered)
        found = self._best(num_sequences, ranked, most, asking, asking)
        return [0] * len(offered) if found is None else ranked.lengths(found[0])

    def _ask_by(self, longest: int, seconds: float) -> None:
        """Decide on the next question after drafts of up to ``longest`` in a step that took so many
        ``seconds`` without."""
        share = self._most * self._asking / (_FREE * seconds)
        self._wanted = min(self._most, longest + 1) if share > 1 and longest else self._most
        self._pause = 0 if longest else min(2 * self._pause + 1, int(share))
        self._left = self._pause

    def _best(
        self,
        num_sequences: int,
        ranked: _Ranked,
        most: int,
        asking: NDArray[np.float64] | float,
        without: float = 0.0,
    ) -> tuple[int, float] | None:
        """How many of the drafts give the most tokens a second, and how many those are, where
        guesses take ``asking`` seconds, or ``without`` drafts; None if that is better."""
        costs = self._costs
        size = min(len(ranked.gains), most, costs.most - num_sequences)
        if size <= 0:
            return None
        rows = np.arange(num_sequences + 1, num_sequences + size + 1)
        taken = asking if isinstance(asking, float) else asking[:size]
        rates = (num_sequences + ranked.gains[:size].cumsum()) / (taken + costs.all_seconds(rows))
        best = int(rates.argmax())
        plain = num_sequences / (without + costs.seconds(num_sequences))
        return (best + 1, float(rates[best])) if rates[best] > _MARGIN * plain else None

    def landed(self, rows: int, seconds: float, sure: bool = False) -> None:
        """Take a step of nothing but decodes into account, or what is ``sure`` of such."""
        self._costs.add(rows, seconds, sure)


class _Ranked(NamedTuple):
    """Drafts, those first that add the most to the tokens that are expected, and those of a
    sequence in their order: how much that is, whose each is, and which of those, from 1 on."""

    gains: NDArray[np.float64]
    owners: NDArray[np.int64]
    places: NDArray[np.int64]
    num_owners: int

    def up_to(self, place: int) -> _Ranked:
        """Only the first ones of every sequence."""
        kept = self.places <= place
        return _Ranked(self.gains[kept], self.owners[kept], self.places[kept], self.num_owners)

    def lengths(self, size: int) -> list[int]:
        """How many of each sequence are among so many."""
        lengths: list[int] = np.bincount(self.owners[:size], minlength=self.num_owners).tolist()
        return lengths


def _ranked(chances: Sequence[float], offered: Sequence[int]) -> _Ranked:
    counts = np.array(offered)
    owners = np.arange(len(counts)).repeat(counts)
    places = np.arange(1, len(owners) + 1) - (counts.cumsum() - counts)[owners]
    gains = np.array(chances, float)[owners] ** places
    order = np.argsort(-gains, kind="stable")
    return _Ranked(gains[order], owners[order], places[order], len(counts))
