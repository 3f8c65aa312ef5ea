"""Slots of the host through which pages of prompts come from other engines and go there."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Staging:
    """Some slots of the host's memory, each for a page of ``page_size`` tokens of every cache.

    ``parts`` are bytes ``[slots, n]`` each: what a slot holds is one row of all of them. Whoever
    has got a slot may read and write it while no step does.
    """

    slots: range
    parts: Sequence[NDArray[np.uint8]]
    page_size: int

    @property
    def slot_bytes(self) -> int:
        """What a page of all caches takes."""
        return sum(part.shape[1] for part in self.parts)

    def pages_for(self, num_tokens: int) -> int:
        """How many slots hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def rows(self, slots: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The memory of slots, in their order."""
        for slot in slots:
            for part in self.parts:
                yield part[slot]


class SlotPool:
    """Gives slots to those who ask for some, in the order in which they asked; belongs to one event
    loop."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.num_slots = len(slots)
        self._free = list(slots)
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    @property
    def num_free(self) -> int:
        """How many nobody has."""
        return len(self._free)

    async def take(self, count: int) -> list[int]:
        """Wait for so many slots, which must not be more than there are."""
        assert count <= self.num_slots, "they would never be there"
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, future))
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())
            else:
                self._waiting.remove((count, future))
                self._serve()  # who waits behind may want less
            raise

    def give(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        self._free += slots
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= len(self._free):
            count, future = self._waiting.popleft()
            if future.cancelled():
                continue
            future.set_result(self._free[-count:])
            del self._free[-count:]
