"""Captures that are put off, where work of another size does the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

# Rows computed for nothing that are worth a capture: that takes 60 ms of an 8B on two H200s, where
# a row takes 20 µs, and a size that has been seen twice will be seen again.
_WORTH = 1024
# Of a head, which is a small part of a step.
HEAD_WORTH = 16 * _WORTH
K = TypeVar("K", bound=Hashable)


class Spared:
    """Chooses what runs work of a size for which nothing is captured: the next larger that is,
    until the rows that it has computed for nothing would have paid for a capture.

    So a batch that shrinks request by request does not stop at every size that it passes. All
    ranks of an engine choose alike.
    """

    def __init__(self) -> None:
        self._wasted: dict[Hashable, int] = {}

    def choose(
        self, wanted: K, size: int, captured: Iterable[tuple[K, int]], worth: int = _WORTH
    ) -> K:
        """``wanted`` of ``size`` rows, which is to be captured if it is not, or another of what is
        ``captured``, each with its rows; a capture is ``worth`` so many rows for nothing."""
        larger = [(rows, key) for key, rows in captured if rows >= size]
        if not larger:
            return wanted
        rows, key = min(larger, key=lambda each: each[0])
        wasted = self._wasted[wanted] = self._wasted.get(wanted, 0) + rows - size
        return wanted if wasted > worth else key

    def forget(self) -> None:
        """Nothing is captured any more."""
        self._wasted.clear()
