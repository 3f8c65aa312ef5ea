"""Between the pages of the device and those of the host: what goes there, what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slipstream.runtime.engine.host_pages import (
    HostPage,
    HostPages,
    HostSpace,
    Transfer,
    page_transfers,
)
from slipstream.runtime.engine.page_hash import node_hash, page_hash, root_hash
from slipstream.runtime.engine.radix_tree import Node
from slipstream.runtime.engine.window_group import WindowGroup, WindowPages


class Offload:
    """What the prefix tree has no room for, kept on the host.

    A page goes there when its node leaves the tree, with its part in every group with a window that
    still has it; a part that was wanted for other tokens before is lost. A page that comes back is
    the sequence's own until its step has landed, like one that it computes. ``transfers`` are made
    in their order, before the moves of the next step that is planned; what that stores can be read
    when it has landed.
    """

    def __init__(
        self,
        space: HostSpace,
        page_size: int,
        caches: tuple[str, ...],
        windows: tuple[WindowGroup, ...],
    ) -> None:
        self.host = HostPages(space)
        self._page_size = page_size
        self._caches = caches
        self._windows = windows
        self._transfers: list[Transfer] = []
        self._stored: list[HostPage] = []

    def evicted(self, node: Node) -> None:
        """Keep the page of a node that has just left the tree, before it is given to others."""
        digest = node_hash(node, self._page_size)
        if not digest:
            return
        held = [group.page_of(node) for group in self._windows]
        bits = sum(1 << i for i, page in enumerate(held) if page is not None)
        page = self.host.put(digest, self._parent(node), bits)
        if page is None:
            return
        self._stored.append(page)
        slot = page.record.slot
        self._transfers += [Transfer(cache, node.page, slot, True) for cache in self._caches]
        for group, number in zip(self._windows, held, strict=True):
            if number is not None:
                self._transfers += [Transfer(cache, number, slot, True) for cache in group.caches]

    def find(
        self, tokens: Sequence[int], prefix: Node, path: Sequence[Node], namespace: str
    ) -> list[HostPage]:
        """The pages of ``tokens`` after ``prefix``, whose nodes are ``path``, that can be brought
        back; at least one token is left to compute."""
        size, depth = self._page_size, prefix.depth
        digest = node_hash(prefix, size) if depth else root_hash(namespace)
        found: list[HostPage] = []
        for index in range(depth, (len(tokens) - 1) // size):
            digest = page_hash(digest, tokens[index * size : (index + 1) * size])
            page = self.host.get(digest)
            if page is None:
                break
            found.append(page)
        while found and not self._windows_serve(path, found, len(tokens)):
            found.pop()
        return found

    def load(
        self, found: Sequence[HostPage], pages: Sequence[int], windows: Sequence[WindowPages]
    ) -> None:
        """Bring pages back into a sequence's own: ``pages`` of the full group, those ``windows`` of
        the others that reach them."""
        first = len(pages) - len(found)
        held = list(zip(self._windows, windows, strict=True))
        for index, page in enumerate(found, first):
            slot = page.record.slot
            self._transfers += page_transfers(self._caches, pages, held, index, slot, False)

    def take(self) -> tuple[list[Transfer], list[HostPage]]:
        """The transfers that a step is to make, and what it stores by that."""
        taken = self._transfers, self._stored
        self._transfers, self._stored = [], []
        return taken

    def forget(self, nodes: Iterable[Node], loaded: Iterable[HostPage]) -> None:
        """Forget spoiled pages: those of nodes, and those that were brought back."""
        digests = [node_hash(node, self._page_size) for node in nodes]
        self.host.forget([*digests, *(page.record.digest for page in loaded)])

    def _parent(self, node: Node) -> bytes:
        parent = node.parent
        return node_hash(parent, self._page_size) if parent and parent.parent else b""

    def _windows_serve(
        self, path: Sequence[Node], found: Sequence[HostPage], num_tokens: int
    ) -> bool:
        """Whether every group with a window finds what that reaches, and has room for it."""
        depth = len(path) + len(found)
        for bit, group in enumerate(self._windows):
            reached = found[max(0, group.first_page(depth) - len(path)) :]
            if not all(page.record.windows >> bit & 1 for page in reached):
                return False
            if group.first_cost(path, num_tokens, depth) > group.num_available:
                return False
        return True
