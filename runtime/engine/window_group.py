"""Pages of caches whose layers see a window of tokens: held only as long as a query can read them.

A node of the prefix tree may have a page here. That page can be wanted for other tokens before the
node is: the node then serves only prefixes whose window does not reach it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slipstream.runtime.engine.radix_tree import Node


@dataclass(slots=True, eq=False)
class WindowPages:
    """The pages of one running sequence in one group, in the order of their positions.

    Those before ``first`` lie behind the window and are not its own any more. ``synced`` is how
    many leading pages the page table of the step builder already shows.
    """

    pages: list[int]
    first: int
    synced: int = 0


class WindowGroup:
    """The pages of all caches with the same window, which share their numbers.

    A sequence needs pages for its window and for the tokens of the next step, of which there are at
    most ``max_step``.
    """

    def __init__(
        self, caches: tuple[str, ...], window: int, max_step: int, num_pages: int, page_size: int
    ) -> None:
        self.caches = caches
        self.num_pages = num_pages
        self._window = window
        self._max_step = max_step
        self._page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        # Pages of the tree's nodes, both ways, how many sequences hold each, and those that none
        # does, least recently used first.
        self._page_of: dict[Node, int] = {}
        self._node_of: dict[int, Node] = {}
        self._holders: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that can be had now."""
        return len(self._free) + len(self._idle)

    def most_pages(self, num_tokens: int) -> int:
        """The most pages that a sequence of ``num_tokens`` ever holds at a time."""
        return min(self._pages_for(num_tokens), self._pages_for(self._window + self._max_step) + 1)

    def serves(self, path: Sequence[Node]) -> bool:
        """Whether the page of every node that the window after ``path`` reaches is still here."""
        return all(node in self._page_of for node in path[self.first_page(len(path)) :])

    def first_page(self, depth: int) -> int:
        """The first page that the window after ``depth`` pages reaches."""
        return self._first_page(depth * self._page_size)

    def page_of(self, node: Node) -> int | None:
        """The page of a node, if it is still here."""
        return self._page_of.get(node)

    def first_cost(self, path: Sequence[Node], num_tokens: int, depth: int) -> int:
        """How many available pages the first step of a sequence takes that begins after ``depth``
        pages, of which ``path`` are shared."""
        start = depth * self._page_size
        end = min(num_tokens, start + self._max_step)
        shared = path[self.first_page(depth) :]
        idle = sum(not self._holders[self._page_of[node]] for node in shared)
        return self._pages_for(end) - self.first_page(depth) - len(shared) + idle

    def allocate(self, path: Sequence[Node], depth: int) -> WindowPages:
        """What the window after ``depth`` pages reaches: shared where ``path`` has it, else its
        own; room for more is made by ``grow``."""
        first = self.first_page(depth)
        pages = [self._page_of[node] for node in path[first:]]
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1
        pages.extend(self._take() for _ in range(depth - max(first, len(path))))
        return WindowPages([0] * first + pages, first)

    def trim(self, held: WindowPages, position: int) -> None:
        """Give back the pages that no query from ``position`` on reads."""
        first = min(self._first_page(position), len(held.pages))
        while held.first < first:
            self._drop(held.pages[held.first])
            held.first += 1

    def grow(self, held: WindowPages, start: int, num_tokens: int) -> bool:
        """Make room for the next step of a sequence of ``num_tokens``, which begins at ``start``;
        False if there are not enough pages."""
        end = min(num_tokens, start + self._max_step)
        missing = self._pages_for(end) - len(held.pages)
        if missing > self.num_available:
            return False
        held.pages.extend(self._take() for _ in range(missing))
        return True

    def shrink(self, held: WindowPages, count: int) -> None:
        """Give back all pages of a sequence but the first ``count``."""
        while len(held.pages) > count:
            self._drop(held.pages.pop())
        held.synced = min(held.synced, count)

    def offer(self, held: WindowPages, index: int, node: Node) -> None:
        """Keep page ``index`` of a sequence for ``node``, if it is still held and has no other."""
        if index >= held.first and node not in self._page_of:
            page = held.pages[index]
            self._page_of[node] = page
            self._node_of[page] = node
            self._holders[page] = 1

    def release(self, held: WindowPages) -> None:
        """Give back every page of a sequence."""
        for page in reversed(held.pages[held.first :]):
            self._drop(page)

    def forget(self, node: Node) -> None:
        """Free the page of a node that has left the tree."""
        page = self._page_of.pop(node, None)
        if page is not None:
            del self._node_of[page], self._idle[page]
            self._free.append(page)

    def check_invariants(self, sequences: Iterable[WindowPages]) -> None:
        """Assert that each page has one owner and each count its holders (for tests)."""
        holders: Counter[int] = Counter()
        for held in sequences:
            holders.update(held.pages[held.first :])
        cached = set(self._node_of)
        assert cached == set(self._page_of.values())
        assert all(holders[page] == self._holders[page] for page in cached), "a wrong count"
        assert {page for page in cached if not holders[page]} == set(self._idle)
        own = [page for page in holders if page not in cached]
        assert all(holders[page] == 1 for page in own), "a page with two owners"
        assert sorted([*self._free, *own, *cached]) == list(range(self.num_pages)), "a page is lost"

    def _first_page(self, position: int) -> int:
        return max(0, position - self._window + 1) // self._page_size

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._node_of.pop(page)]
        return page

    def _drop(self, page: int) -> None:
        if page not in self._node_of:
            self._free.append(page)
            return
        self._holders[page] -= 1
        if not self._holders[page]:
            self._idle[page] = None
