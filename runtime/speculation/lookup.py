"""Where in a text of tokens others stand, and what follows them there."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

# Places that are compared when a text is searched, and tokens of each.
_MOST_PLACES = 16
_MOST_COMPARED = 32
# How far behind the place where it was lost a single token is enough to find it again.
_NEAR = 32


class PairIndex:
    """Where every pair of neighbours of a text stands; a token costs the same however long that is.

    As a compressor's hash chains: the last place of each pair, and for each place the one before.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._earlier = array("i")

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new of a text that has grown."""
        last, earlier = self._last, self._earlier
        for end in range(len(earlier), len(tokens)):
            pair = tokens[end - 1] << 32 | tokens[end] if end else -1
            earlier.append(last.get(pair, -1))
            last[pair] = end

    def before(self, end: int) -> Iterator[int]:
        """Earlier places that end in the same pair as the place ``end``, the nearest first."""
        for _ in range(_MOST_PLACES):
            end = self._earlier[end]
            if end < 1:
                return
            yield end

    def places(self, first: int, second: int) -> Iterator[int]:
        """Where a pair ends, the last place first."""
        end = self._last.get(first << 32 | second)
        if end is not None:
            yield end
            yield from self.before(end)


class OwnText:
    """Follows a sequence through what it said before: where it stands after the longest run of
    tokens that are its last ones, and from there on for as long as it goes on in the same way."""

    def __init__(self) -> None:
        self._index = PairIndex()
        self._seen = 0
        self._next = -1

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed there, up to ``most`` tokens; ``tokens`` have only grown since."""
        for token in tokens[self._seen :]:
            follows = self._next >= 0 and tokens[self._next] == token
            self._next = self._next + 1 if follows else -1
        self._seen = len(tokens)
        self._index.extend(tokens)
        if self._next < 0:
            self._next = self._find(tokens)
        if self._next < 0:
            return []
        found = list(tokens[self._next : self._next + most])
        while len(found) < most:  # it ends in a repetition, which goes on
            found.append(found[self._next + len(found) - len(tokens)])
        return found

    def _find(self, tokens: Sequence[int]) -> int:
        longest, found = 0, -1
        for end in self._index.before(len(tokens) - 1):
            agreed = _agreement(tokens, end, tokens)
            if agreed > longest:
                longest, found = agreed, end + 1
        return found


class OtherText:
    """Follows an output through a text that it is expected to resemble, from its beginning on."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._index = PairIndex()
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
            for end in self._index.places(output[-2], output[-1]):
                score = _agreement(self._text, end, output), -abs(end - self._lost)
                if score > best or found < 0:
                    best, found = score, end + 1
            if found >= 0:
                return found
        near = self._text[self._lost : self._lost + _NEAR]
        return self._lost + near.index(output[-1]) + 1 if output and output[-1] in near else -1


def _agreement(text: Sequence[int], end: int, tokens: Sequence[int]) -> int:
    """How many tokens up to ``end`` of a text are the last ones of ``tokens``."""
    most = min(_MOST_COMPARED, end + 1, len(tokens))
    for count in range(most):
        if text[end - count] != tokens[-1 - count]:
            return count
    return most
