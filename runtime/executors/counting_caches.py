"""What the counting model keeps in the caches of a contract: tokens in pages, a hash in a state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import CacheSpec
from slipstream.runtime.engine.host_pages import HostSpace, Transfer
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.engine.step import IntArray, StepBatch

GARBAGE = -1
_MOST_SLOTS = 4096


class CountingCache(Protocol):
    """A cache that a step writes and whose content is verified."""

    name: str

    def write(self, batch: StepBatch, tokens: IntArray) -> None:
        """Keep the ``tokens`` of a step."""
        ...

    def move(self, moves: Sequence[Move]) -> None:
        """Make those of a step's moves that are in this cache."""
        ...

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Make transfers of this cache, from and to the host."""
        ...

    def spoil(self, batch: StepBatch) -> None:
        """Leave garbage wherever a step would have written."""
        ...

    def check(self, batch: StepBatch, index: int, context: IntArray) -> None:
        """AssertionError unless a sequence finds here what its whole ``context`` leaves."""
        ...


class PagedTokens:
    """The tokens of every sequence in its pages, as far back as the cache's window."""

    def __init__(self, spec: CacheSpec, num_pages: int) -> None:
        self.name, self._window, self._page_size = spec.name, spec.window, spec.page_size
        self._memory = np.full(num_pages * spec.page_size, GARBAGE, np.int32)
        self._host = np.empty((0, spec.page_size), np.int32)

    def reserve_host(self, num_slots: int) -> NDArray[np.uint8]:
        """Make so many slots, and return their bytes."""
        self._host = np.full((num_slots, self._page_size), GARBAGE, np.int32)
        return self._host.view(np.uint8)

    def write(self, batch: StepBatch, tokens: IntArray) -> None:
        """Every token to its slot, which is that of its position, the last of them in order."""
        paged, size = batch.pages[self.name], self._page_size
        slots, positions = paged.slot_mapping, batch.positions
        owners = np.repeat(np.arange(len(batch.context_len)), np.diff(batch.query_start))
        after = batch.query_start[1:][owners] - np.arange(len(tokens))
        assert np.array_equal(positions, batch.context_len[owners] - after), "wrong positions"
        right = paged.page_table[owners, positions // size] * size + positions % size
        assert np.array_equal(slots, right), "wrong slots"
        assert len(np.unique(slots)) == len(tokens), "a slot written twice"
        self._memory[slots] = tokens

    def move(self, moves: Sequence[Move]) -> None:
        """Copy pages as the step before left them."""
        own = [move for move in moves if move.cache == self.name]
        targets = {move.destination for move in own}
        assert len(targets) == len(own), "a page moved over another"
        assert not targets & {move.source for move in own}, "a page moved on"
        pages = self._memory.reshape(-1, self._page_size)
        for move in own:
            pages[move.destination] = pages[move.source]

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy pages one after the other."""
        pages = self._memory.reshape(-1, self._page_size)
        for each in transfers:
            source, target = pages[each.page], self._host[each.slot]
            if not each.stores:
                source, target = target, source
            assert source[0] != GARBAGE, "a page that nobody has computed"
            target[:] = source

    def spoil(self, batch: StepBatch) -> None:
        """Garbage in every slot."""
        self._memory[batch.pages[self.name].slot_mapping] = GARBAGE

    def read(self, batch: StepBatch, index: int) -> IntArray:
        """One sequence's tokens, through its page table, from the first that a query sees."""
        size, length = self._page_size, int(batch.context_len[index])
        first = 0
        if self._window:
            begin, end = batch.query_start[index : index + 2].tolist()
            first = max(length - (end - begin) - self._window + 1, 0)
        table = batch.pages[self.name].page_table[index, first // size : -(-length // size)]
        tokens: IntArray = self._memory.reshape(-1, size)[table].reshape(-1)
        return tokens[first % size : first % size + length - first]

    def check(self, batch: StepBatch, index: int, context: IntArray) -> None:
        """The tokens that the window shows are the last of the context."""
        seen = self.read(batch, index)
        same = np.array_equal(seen, context[len(context) - len(seen) :])
        assert same, f"pages of {self.name} hold another sequence"


class HashedState:
    """A hash of all tokens of a sequence in its slot, made anew where a sequence begins."""

    def __init__(self, spec: CacheSpec) -> None:
        self.name = spec.name
        self._states: dict[int, int] = {}

    def write(self, batch: StepBatch, tokens: IntArray) -> None:
        """Go on from the state of every sequence."""
        for index, slot in enumerate(batch.slots.tolist()):
            begin, end = batch.query_start[index : index + 2]
            begins = int(batch.context_len[index]) == end - begin
            state = 0 if begins else self._states.get(slot, GARBAGE)
            self._states[slot] = _hash(tokens[begin:end], state)

    def move(self, moves: Sequence[Move]) -> None:
        """Copy states."""
        for move in moves:
            if move.cache == self.name:
                self._states[move.destination] = self._states[move.source]

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """There are none: what follows a state cannot be shared."""
        assert not transfers

    def spoil(self, batch: StepBatch) -> None:
        """Garbage in every slot."""
        self._states.update(dict.fromkeys(batch.slots.tolist(), GARBAGE))

    def check(self, batch: StepBatch, index: int, context: IntArray) -> None:
        """The state is that of the whole context."""
        same = self._states[int(batch.slots[index])] == _hash(context, 0)
        assert same, f"the state of {self.name} is of another sequence"


class CountingHost:
    """The part of a counting device that keeps pages on the host; a page has a byte."""

    def __init__(self, graphs: Iterable[tuple[PagedTokens, Sequence[CountingCache]]]) -> None:
        """The caches of every graph."""
        caches = [cache for whole, others in graphs for cache in (whole, *others)]
        self._all = list(dict.fromkeys(caches))
        self._stored = self._loaded = Traffic()

    @property
    def stored(self) -> Traffic:
        """Pages that went to the host."""
        return self._stored

    @property
    def loaded(self) -> Traffic:
        """Pages that came back."""
        return self._loaded

    def reserve_host(self, num_bytes: int, file: str | None) -> HostSpace:
        """A slot for every byte, if that is not more than tests have a use for."""
        count = min(num_bytes, _MOST_SLOTS)
        paged = [cache for cache in self._all if isinstance(cache, PagedTokens)]
        return HostSpace(count, parts=tuple(cache.reserve_host(count) for cache in paged))

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Make transfers in all caches."""
        for cache in self._all:
            cache.transfer([each for each in transfers if each.cache == cache.name])
        stored = sum(each.stores for each in transfers)
        self._stored += Traffic(stored)
        self._loaded += Traffic(len(transfers) - stored)


def _hash(tokens: IntArray, state: int) -> int:
    for token in tokens.tolist():
        state = (state * 31 + token + 2) % (1 << 31)
    return state
