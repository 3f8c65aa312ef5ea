"""A radix tree of KV pages: each edge is one full page of tokens, so equal prefixes share pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# A caller's namespace is a text, "" if it names none; a request that shares with nobody but its own
# siblings has a number.
Namespace = str | int
Key = tuple[Namespace, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One page of computed tokens; the path from the root spells the prefix it belongs to.

    ``depth`` counts the pages on that path. ``references`` counts the sequences whose prefix passes
    through here, so it never grows from parent to child. ``digest`` is its name outside of the
    tree, once asked for (``page_hash``).
    """

    parent: Node | None
    key: Key
    page: int
    depth: int
    references: int = 0
    children: dict[Key, Node] = field(default_factory=dict)
    digest: bytes | None = None


class TreeObserver(Protocol):
    """Who hears which pages can be shared."""

    def stored(self, node: Node) -> None:
        """Hear of a page that has entered the tree, after its parent."""
        ...

    def removed(self, node: Node) -> None:
        """Hear of a page that has left it, before its parent."""
        ...


class RadixTree:
    """Finds, shares and forgets pages by their namespace and the tokens they hold."""

    def __init__(self, page_size: int) -> None:
        self.observer: TreeObserver | None = None
        self._page_size = page_size
        self.root = Node(parent=None, key=(), page=-1, depth=0)
        # Unreferenced nodes, least recently used first. A path is released from its deep end, so a
        # child always stands before its parent and the first entry is always a leaf.
        self._idle: OrderedDict[Node, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Pages that nothing references and that ``evict`` could return."""
        return len(self._idle)

    def key(self, tokens: Sequence[int], index: int, namespace: Namespace = "") -> Key:
        """The key of page ``index`` of ``tokens``; that of a first page names its namespace."""
        start = index * self._page_size
        page = tuple(tokens[start : start + self._page_size])
        return page if index or namespace == "" else (namespace, *page)

    def match(self, tokens: Sequence[int], max_pages: int, namespace: Namespace = "") -> Node:
        """The deepest node whose path is a prefix of ``tokens``, at most ``max_pages`` deep."""
        node = self.root
        for index in range(max_pages):
            child = node.children.get(self.key(tokens, index, namespace))
            if child is None:
                break
            node = child
        return node

    def path(self, node: Node) -> Iterator[Node]:
        """``node`` and its ancestors, deepest first, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def acquire(self, node: Node) -> None:
        """Reference the path to ``node``."""
        for step in self.path(node):
            self._reference(step)

    def release(self, node: Node) -> None:
        """Undo one ``acquire`` (and the ``extend`` calls that followed it)."""
        for step in self.path(node):
            step.references -= 1
            if step.references == 0:
                self._idle[step] = None

    def extend(self, node: Node, key: Key, page: int) -> Node:
        """Lengthen a referenced path by one page and reference it.

        Returns the existing child if these tokens are already held; its page then differs from
        ``page``, which stays the caller's.
        """
        child = node.children.get(key)
        if child is None:
            child = Node(parent=node, key=key, page=page, depth=node.depth + 1, references=1)
            node.children[key] = child
            if self.observer is not None:
                self.observer.stored(child)
        else:
            self._reference(child)
        return child

    def evict(self) -> Node:
        """Forget the least recently used unreferenced leaf and return it."""
        node, _ = self._idle.popitem(last=False)
        assert node.parent is not None and not node.children, "an idle child follows its parent"
        del node.parent.children[node.key]
        self._tell_removed([node])
        return node

    def forget(self, node: Node) -> list[Node]:
        """Forget an unreferenced node and all that follow it, and return them."""
        assert node.parent is not None and not node.references
        del node.parent.children[node.key]
        forgotten = [node, *self._below(node)]
        for each in forgotten:
            del self._idle[each]
        self._tell_removed(forgotten)
        return forgotten

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        return self._below(self.root)

    def _below(self, node: Node) -> Iterator[Node]:
        stack = list(node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _tell_removed(self, nodes: Sequence[Node]) -> None:
        """Tell of nodes of which each follows its parent."""
        if self.observer is not None:
            for node in reversed(nodes):
                self.observer.removed(node)

    def _reference(self, node: Node) -> None:
        if node.references == 0:
            del self._idle[node]
        node.references += 1
