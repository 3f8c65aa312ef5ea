"""Who owns which KV page: the free list, the sequences, and the prefix tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slipstream.runtime.engine.radix_tree import Node, RadixTree


@dataclass(slots=True, eq=False)
class Allocation:
    """The pages of one running sequence, in the order of their positions.

    The first ``prefix.depth`` pages are in the tree and may be shared; the sequence writes only to
    the others, so nothing is ever copied. ``synced`` is how many leading pages the page table of
    the step builder already shows.
    """

    pages: list[int]
    prefix: Node
    synced: int = 0


class KVCacheManager:
    """Fixed-size pages with reference counts; computed full pages are kept for reuse."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._share = enable_prefix_caching
        self._free = list(range(num_pages - 1, -1, -1))
        self._tree = RadixTree(page_size)

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free ones, and cached ones that nothing references."""
        return len(self._free) + self._tree.num_idle

    @property
    def usage(self) -> float:
        """Fraction of all pages that running sequences hold."""
        return 1 - self.num_available / self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def match(self, tokens: Sequence[int]) -> Node:
        """The longest cached prefix of ``tokens``, leaving at least one token to compute."""
        return self._tree.match(tokens, (len(tokens) - 1) // self.page_size)

    def no_match(self) -> Node:
        """The empty prefix."""
        return self._tree.root

    def cost(self, prefix: Node, num_pages: int) -> int:
        """How many available pages an allocation of ``num_pages`` after ``prefix`` would take."""
        idle = sum(node.references == 0 for node in self._tree.path(prefix))
        return num_pages - prefix.depth + idle

    def allocate(self, prefix: Node, num_tokens: int) -> Allocation:
        """Pages for ``num_tokens`` that begin with ``prefix``; the caller has checked ``cost``."""
        self._tree.acquire(prefix)
        pages = [node.page for node in self._tree.path(prefix)]
        pages.reverse()
        pages.extend(self._take() for _ in range(self.pages_for(num_tokens) - prefix.depth))
        return Allocation(pages, prefix)

    def grow(self, allocation: Allocation, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens, at most one page more; False if no page is left."""
        if num_tokens <= len(allocation.pages) * self.page_size:
            return True
        if not self.num_available:
            return False
        allocation.pages.append(self._take())
        return True

    def commit(self, allocation: Allocation, tokens: Sequence[int], num_computed: int) -> None:
        """Offer the pages filled by the first ``num_computed`` of ``tokens`` to later sequences.

        If another sequence was first with the same tokens, its page replaces ours.
        """
        size = self.page_size
        while self._share and num_computed >= (allocation.prefix.depth + 1) * size:
            index = allocation.prefix.depth
            key = tuple(tokens[index * size : (index + 1) * size])
            own = allocation.pages[index]
            allocation.prefix = self._tree.extend(allocation.prefix, key, own)
            if allocation.prefix.page != own:
                self._free.append(own)
                allocation.pages[index] = allocation.prefix.page
                allocation.synced = min(allocation.synced, index)

    def release(self, allocation: Allocation) -> None:
        """Give back every page; those in the tree stay cached until their space is wanted."""
        self._free.extend(reversed(allocation.pages[allocation.prefix.depth :]))
        self._tree.release(allocation.prefix)

    def check_invariants(self, allocations: Iterable[Allocation]) -> None:
        """Assert that each page has one owner and each reference count its holders (for tests)."""
        references: Counter[Node] = Counter()
        owned: list[int] = []
        for allocation in allocations:
            prefix = list(self._tree.path(allocation.prefix))
            references.update(prefix)
            depth = allocation.prefix.depth
            assert allocation.pages[:depth] == [node.page for node in reversed(prefix)]
            owned += allocation.pages[depth:]
        nodes = list(self._tree.nodes())
        for node in nodes:
            assert node.references == references.pop(node, 0), "a reference without a holder"
            assert node.parent is not None and node.parent.children[node.key] is node
        assert not references, "a sequence holds an evicted page"
        assert sum(node.references == 0 for node in nodes) == self._tree.num_idle
        pages = [*self._free, *owned, *(node.page for node in nodes)]
        assert sorted(pages) == list(range(self.num_pages)), "a page is lost or has two owners"

    def _take(self) -> int:
        return self._free.pop() if self._free else self._tree.evict()
