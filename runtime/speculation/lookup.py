"""Where in a text of tokens others stand, and what follows them there."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

# Places that are compared when a text is searched.
_MOST_PLACES = 16
# Tokens of a prediction that are compared, and of the shortest run that is looked up.
_COMPARED = 32
_PAIR = 2
# How far behind the place where it was lost a single token is enough to find it again.
_NEAR = 32


class RunIndex:
    """Where every run of ``size`` tokens of a text stands; a token costs the same however long that
    is.

    As a compressor's hash chains: the last place of each run, and for each place the one before.
    """

    def __init__(self, size: int = _PAIR) -> None:
        self._size = size
        self._last: dict[tuple[int, ...], int] = {}
        self._earlier = array("i")

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new of a text that has grown."""
        last, earlier, before = self._last, self._earlier, self._size - 1
        for end in range(len(earlier), len(tokens)):
            if end < before:
                earlier.append(-1)
                continue
            run = tuple(tokens[end - before : end + 1])
            earlier.append(last.get(run, -1))
            last[run] = end

    def before(self, end: int) -> Iterator[int]:
        """Earlier places that end in the same run as the place ``end``, the nearest first."""
        for _ in range(_MOST_PLACES):
            end = self._earlier[end]
            if end < 0:
                return
            yield end

    def places(self, tokens: Sequence[int]) -> Iterator[int]:
        """Where the last run of ``tokens`` ends, the last place first."""
        end = self._last.get(tuple(tokens[-self._size :]))
        if end is not None:
            yield end
            yield from self.before(end)


class OwnText:
    """Follows a sequence through what it said before: where it stands after the longest run of
    tokens that are its last ones, and from there on for as long as it goes on in the same way.

    A run has at least ``shortest`` tokens, and more than ``longest`` are not compared. ``agreed``
    tells of how many the last guess was made.
    """

    def __init__(self, shortest: int = _PAIR, longest: int = _COMPARED) -> None:
        self.agreed = 0
        self._longest = longest
        self._index = RunIndex(shortest)
        self._seen = 0
        self._next = -1

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed there, up to ``most`` tokens; ``tokens`` have only grown since."""
        for token in tokens[self._seen :]:
            follows = self._next >= 0 and tokens[self._next] == token
            self._next = self._next + 1 if follows else -1
            self.agreed = self.agreed + 1 if follows else 0
        self._seen = len(tokens)
        self._index.extend(tokens)
        if self._next < 0:
            self.agreed, self._next = self._find(tokens)
        if self._next < 0:
            return []
        found = list(tokens[self._next : self._next + most])
        while len(found) < most:  # it ends in a repetition, which goes on
            found.append(found[self._next + len(found) - len(tokens)])
        return found

    def _find(self, tokens: Sequence[int]) -> tuple[int, int]:
        return longest(tokens, self._index.before(len(tokens) - 1), tokens, self._longest)


class OtherText:
    """Follows an output through a text that it is expected to resemble, from its beginning on."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._index = RunIndex()
        self._index.extend(text)
        self._seen = 0
        self._next = 0  # where the output is expected to go on, -1: unknown
        self._lost = 0  # where it was when it became so

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """What follows in the text, up to ``most`` tokens; ``output`` has only grown since."""
        for token in output[self._seen :]:
            if 0 <= self._next < len(self._text) and self._text[self._next] == token:
                self._next += 1
                self._lost = self._next
            else:
                self._next = -1
        self._seen = len(output)
        if self._next < 0:
            self._next = self._find(output)
        return list(self._text[self._next : self._next + most]) if self._next >= 0 else []

    def _find(self, output: Sequence[int]) -> int:
        """The place with the longest run that agrees, or else the nearest."""
        if len(output) > 1:
            best, found = (0, 0), -1
            for end in self._index.places(output):
                agreed = _agreement(self._text, end, output, _COMPARED)
                score = agreed, -abs(end - self._lost)
                if score > best or found < 0:
                    best, found = score, end + 1
            if found >= 0:
                return found
        near = self._text[self._lost : self._lost + _NEAR]
        return self._lost + near.index(output[-1]) + 1 if output and output[-1] in near else -1


def longest(
    text: Sequence[int], ends: Iterable[int], tokens: Sequence[int], most: int
) -> tuple[int, int]:
    """How many tokens, ``most`` at most, up to one of the ``ends`` in a text are the last ones of
    ``tokens``, and the place after it: the first of those with the most; -1 where there is none."""
    best, place = 0, -1
    for end in ends:
        agreed = _agreement(text, end, tokens, most)
        if agreed > best:
            best, place = agreed, end + 1
    return best, place


def _agreement(text: Sequence[int], end: int, tokens: Sequence[int], most: int) -> int:
    """How many tokens up to ``end`` of a text are the last ones of ``tokens``."""
    most = min(most, end + 1, len(tokens))
    for count in range(most):
        if text[end - count] != tokens[-1 - count]:
            return count
    return most
