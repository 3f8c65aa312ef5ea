"""Who owns which KV page: the free list, the sequences, and the prefix tree."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.runtime.engine.handover import Handover, Handovers
from slipstream.runtime.engine.host_pages import HostPage, HostSpace, Transfer
from slipstream.runtime.engine.offload import Offload
from slipstream.runtime.engine.radix_tree import Namespace, Node, RadixTree, TreeObserver
from slipstream.runtime.engine.window_group import WindowGroup, WindowPages

_NEVER = sys.maxsize


class Move(NamedTuple):
    """A page of one cache to be copied over another before the layers of a step."""

    cache: str
    source: int
    destination: int


class Transfers(NamedTuple):
    """Copies between device and host in their order, what of the tree's they bring to the host, and
    the handovers that they belong to."""

    copies: Sequence[Transfer] = ()
    stored: Sequence[HostPage] = ()
    handed: Sequence[Handover] = ()


NO_TRANSFERS = Transfers()


@dataclass(slots=True, eq=False)
class Allocation:
    """The pages of one running sequence, in the order of their positions.

    The first ``prefix.depth`` pages are in the tree and may be shared; the sequence writes only to
    the others. ``synced`` is how many leading pages the page table of the step builder already
    shows. ``due`` is how many tokens fill the next page that is to be offered to others.
    ``windows`` are its pages in each group that has a window. ``loaded`` has come back from the
    host.
    """

    pages: list[int]
    prefix: Node
    synced: int = 0
    namespace: Namespace = ""
    due: int = _NEVER
    windows: list[WindowPages] = field(default_factory=list)
    loaded: Sequence[HostPage] = ()


class KVCacheManager:
    """Fixed-size pages with reference counts; computed full pages are kept for reuse.

    Caches that remember all tokens share their page numbers and so are one group, which the prefix
    tree follows; those with a window are groups beside it (``windows``). Sequences whose
    ``has_states`` cannot begin in the middle, so nothing of theirs is shared.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        enable_prefix_caching: bool = True,
        *,
        caches: tuple[str, ...] = (),
        windows: tuple[WindowGroup, ...] = (),
        has_states: bool = False,
        host: HostSpace | None = None,
    ) -> None:
        """``host`` is where pages go that leave the tree; None: nowhere."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.caches = caches
        self.windows = windows
        self._keeps = enable_prefix_caching
        self._has_states = has_states
        self._free = list(range(num_pages - 1, -1, -1))
        self._tree = RadixTree(page_size)
        self.offload = None if host is None else Offload(host, page_size, caches, windows)
        self.handovers = Handovers(caches, windows)

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free ones, and cached ones that nothing references."""
        return len(self._free) + self._tree.num_idle

    @property
    def usage(self) -> float:
        """Fraction of all pages that running sequences hold, in the group that is fullest."""
        left = self.num_available / self.num_pages
        return 1 - min([left, *(g.num_available / g.num_pages for g in self.windows)])

    def observe(self, observer: TreeObserver) -> None:
        """Tell of pages that can be shared from now on, and of those that no longer can."""
        self._tree.observer = observer

    def shares(self, namespace: Namespace) -> bool:
        """Whether pages computed in ``namespace`` can serve another sequence."""
        return not self._has_states and (self._keeps or isinstance(namespace, int))

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def match(self, tokens: Sequence[int], namespace: Namespace = "") -> Node:
        """The longest cached prefix of ``tokens``, leaving at least one token to compute."""
        if not self.shares(namespace):
            return self.no_match()
        node = self._tree.match(tokens, (len(tokens) - 1) // self.page_size, namespace)
        while self.windows and node.parent is not None:
            path = self._path(node)
            if all(group.serves(path) for group in self.windows):
                break
            node = node.parent
        return node

    def no_match(self) -> Node:
        """The empty prefix."""
        return self._tree.root

    def cost(self, prefix: Node, num_pages: int) -> int:
        """How many available pages an allocation of ``num_pages`` after ``prefix`` would take."""
        idle = sum(node.references == 0 for node in self._tree.path(prefix))
        return num_pages - prefix.depth + idle

    def windows_fit(self, prefix: Node, num_tokens: int) -> bool:
        """Whether each group with a window has room for the first step of a sequence."""
        path = self._path(prefix)
        costs = (group.first_cost(path, num_tokens, len(path)) for group in self.windows)
        return all(c <= g.num_available for c, g in zip(costs, self.windows, strict=True))

    def windows_fit_all(self, ends: Sequence[int]) -> bool:
        """Whether each group with a window can hold sequences of so many tokens to their ends.

        None counts on what it shares: it may be the last to hold that, or the first to give it up.
        """
        return all(sum(map(group.most_pages, ends)) <= group.num_pages for group in self.windows)

    def find(self, tokens: Sequence[int], prefix: Node, namespace: Namespace) -> list[HostPage]:
        """The pages of ``tokens`` after ``prefix`` that the host has."""
        if self.offload is None or not isinstance(namespace, str) or not self.shares(namespace):
            return []
        return self.offload.find(tokens, prefix, self._path(prefix), namespace)

    def windows_take(self, prefix: Node, handover: Handover) -> bool:
        """Whether each group with a window has room for what it reaches of a handover that goes on
        after ``prefix``."""
        path, length = self._path(prefix), handover.num_tokens
        depth = length // self.page_size
        costs = (group.first_cost(path, length + 1, depth) for group in self.windows)
        return all(c <= g.num_available for c, g in zip(costs, self.windows, strict=True))

    def allocate(
        self,
        prefix: Node,
        num_tokens: int,
        namespace: Namespace = "",
        found: Sequence[HostPage] = (),
        handover: Handover | None = None,
    ) -> Allocation:
        """Pages for ``num_tokens`` that begin with ``prefix`` and what was ``found`` on the host
        after it, or came by a ``handover``; the caller has checked ``cost``."""
        if self.offload is not None:
            self.offload.host.hold(found)
        self._tree.acquire(prefix)
        path, depth = self._path(prefix), prefix.depth + len(found)
        start = depth * self.page_size
        if handover is not None:
            start = handover.num_tokens
            depth = start // self.page_size
        pages = [node.page for node in path]
        pages.extend(self._take() for _ in range(self.pages_for(num_tokens) - prefix.depth))
        due = (prefix.depth + 1) * self.page_size if self.shares(namespace) else _NEVER
        windows = [group.allocate(path, depth) for group in self.windows]
        allocation = Allocation(
            pages, prefix, namespace=namespace, due=due, windows=windows, loaded=found
        )
        if self.offload is not None:
            self.offload.load(found, pages[:depth], windows)
            self.offload.host.let_go(found)
        self.grow_windows(allocation, start, num_tokens)
        if handover is not None:
            self.handovers.load(handover, allocation, prefix.depth)
        return allocation

    def take_transfers(self) -> Transfers:
        """What a step is to bring to the host and back before its moves. What was computed goes
        before its pages are written, and what was wanted before goes before others come there."""
        if self.offload is None and not self.handovers.waits:
            return NO_TRANSFERS
        first, last, handed = self.handovers.take()
        transfers, stored = ([], []) if self.offload is None else self.offload.take()
        return Transfers([*first, *transfers, *last], stored, handed)

    def landed(self, transfers: Transfers) -> None:
        """Note that a step has ended well which has made these."""
        if self.offload is not None:
            self.offload.host.land(transfers.stored)
        for handover in transfers.handed:
            handover.settled(True)

    def failed(self, transfers: Transfers) -> None:
        """Note that a step has failed which was to make these."""
        if self.offload is not None:
            self.offload.host.drop(transfers.stored)
        for handover in transfers.handed:
            handover.settled(False)

    def spill(self) -> None:
        """Bring all pages that nothing references to the host."""
        while self._tree.num_idle:
            self._evict()

    def grow(self, allocation: Allocation, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens; False, and nothing is taken, if pages are short."""
        if num_tokens <= len(allocation.pages) * self.page_size:
            return True
        missing = self.pages_for(num_tokens) - len(allocation.pages)
        if missing > self.num_available:
            return False
        allocation.pages.extend(self._take() for _ in range(missing))
        return True

    def grow_windows(self, allocation: Allocation, start: int, num_tokens: int) -> bool:
        """Give back what no step from position ``start`` on reads and make room for the next, in
        every group with a window; False if pages are short."""
        for group, held in zip(self.windows, allocation.windows, strict=True):
            group.trim(held, start)
            if not group.grow(held, start, num_tokens):
                return False
        return True

    def shrink(self, allocation: Allocation, num_tokens: int) -> None:
        """Give back the pages that hold none of the first ``num_tokens`` tokens."""
        count = self.pages_for(num_tokens)
        if count < len(allocation.pages):
            self._free.extend(reversed(allocation.pages[count:]))
            del allocation.pages[count:]
            allocation.synced = min(allocation.synced, count)
        for group, held in zip(self.windows, allocation.windows, strict=True):
            group.shrink(held, count)

    def commit(self, allocation: Allocation, tokens: Sequence[int], num_computed: int) -> None:
        """Offer the pages filled by the first ``num_computed`` of ``tokens`` to later sequences.

        If another sequence was first with the same tokens, its page replaces ours.
        """
        while num_computed >= allocation.due:
            index = allocation.prefix.depth
            key = self._tree.key(tokens, index, allocation.namespace)
            own = allocation.pages[index]
            allocation.prefix = self._tree.extend(allocation.prefix, key, own)
            allocation.due += self.page_size
            if allocation.prefix.page != own:
                self._free.append(own)
                allocation.pages[index] = allocation.prefix.page
                allocation.synced = min(allocation.synced, index)
            for group, held in zip(self.windows, allocation.windows, strict=True):
                group.offer(held, index, allocation.prefix)

    def holds(self, allocation: Allocation, index: int) -> bool:
        """Whether a sequence shares its pages and still holds page ``index`` in every group."""
        return allocation.due != _NEVER and all(w.first <= index for w in allocation.windows)

    def copy_page(self, source: Allocation, destination: Allocation, index: int) -> list[Move]:
        """The moves that give one sequence what another has in its page ``index``."""
        groups = [(self.caches, source.pages, destination.pages)]
        pairs = zip(self.windows, source.windows, destination.windows, strict=True)
        groups += [(group.caches, theirs.pages, ours.pages) for group, theirs, ours in pairs]
        return [
            Move(cache, theirs[index], ours[index])
            for caches, theirs, ours in groups
            for cache in caches
        ]

    def release(self, allocation: Allocation, *, spoiled: bool = False) -> None:
        """Give back every page; those in the tree stay cached until their space is wanted.

        Of a ``spoiled`` sequence, those that no other reads are forgotten, with all that were
        computed from them.
        """
        self._free.extend(reversed(allocation.pages[allocation.prefix.depth :]))
        self._tree.release(allocation.prefix)
        for group, held in zip(self.windows, allocation.windows, strict=True):
            group.release(held)
        if spoiled:
            self._forget(allocation)

    def check_invariants(self, allocations: Iterable[Allocation]) -> None:
        """Assert that each page has one owner and each reference count its holders (for tests)."""
        allocations = list(allocations)
        references: Counter[Node] = Counter()
        owned: list[int] = []
        for allocation in allocations:
            prefix = self._path(allocation.prefix)
            references.update(prefix)
            depth = allocation.prefix.depth
            assert allocation.pages[:depth] == [node.page for node in prefix]
            owned += allocation.pages[depth:]
        nodes = list(self._tree.nodes())
        for node in nodes:
            assert node.references == references.pop(node, 0), "a reference without a holder"
            assert node.parent is not None and node.parent.children[node.key] is node
        assert not references, "a sequence holds an evicted page"
        assert sum(node.references == 0 for node in nodes) == self._tree.num_idle
        pages = [*self._free, *owned, *(node.page for node in nodes)]
        assert sorted(pages) == list(range(self.num_pages)), "a page is lost or has two owners"
        for i, group in enumerate(self.windows):
            group.check_invariants(allocation.windows[i] for allocation in allocations)
        if self.offload is not None:
            self.offload.host.check_invariants()

    def _path(self, node: Node) -> list[Node]:
        """The nodes from the root, which is left out, to ``node``."""
        return list(self._tree.path(node))[::-1]

    def _forget(self, allocation: Allocation) -> None:
        idle = [node for node in self._tree.path(allocation.prefix) if not node.references]
        nodes = self._tree.forget(idle[-1]) if idle else []
        for node in nodes:
            self._freed(node)
        if self.offload is not None:
            self.offload.forget(nodes, allocation.loaded)

    def _take(self) -> int:
        if not self._free:
            self._evict()
        return self._free.pop()

    def _evict(self) -> None:
        node = self._tree.evict()
        if self.offload is not None:
            self.offload.evicted(node)
        self._freed(node)

    def _freed(self, node: Node) -> None:
        """Take back the pages of a node that has left the tree."""
        self._free.append(node.page)
        for group in self.windows:
            group.forget(node)
