"""The events of a prefix tree, in the words of vLLM, and the names of its pages.

A page is named by a hash of its tokens and all before them: the same in every process and run, and
different for each ``cache_salt``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, cast

from slipstream.runtime.engine.radix_tree import Namespace, Node

_BYTES = 8  # of a hash
_ROOT = bytes(_BYTES)


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Pages that follow one another, and the one before, were computed and may be shared.

    ``token_ids`` are those of all pages. ``extra_keys`` has the ``cache_salt`` of a first page,
    in the place of that page.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    extra_keys: list[list[str] | None] | None = None
    lora_id: None = None
    lora_name: None = None
    medium: Literal["GPU"] = "GPU"  # vLLM's word for the pages that steps read, wherever they are
    type: Literal["BlockStored"] = "BlockStored"


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Pages can no longer be shared."""

    block_hashes: list[int]
    medium: Literal["GPU"] = "GPU"
    type: Literal["BlockRemoved"] = "BlockRemoved"


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """There are no pages any more, or none yet."""

    type: Literal["AllBlocksCleared"] = "AllBlocksCleared"


Event = BlockStored | BlockRemoved | AllBlocksCleared


def page_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page after ``parent``, in 8 bytes."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}q", *tokens), digest_size=_BYTES).digest()


def root_hash(cache_salt: str) -> bytes:
    """What stands for the page before the first."""
    return blake2b(cache_salt.encode(), digest_size=_BYTES).digest() if cache_salt else _ROOT


class EventLog:
    """Observes a tree and keeps what happened until it is taken.

    Pages that only the siblings of one request share are no one else's business.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._hashes: dict[Node, bytes] = {}  # of the pages that others may share
        self._events: list[Event] = []

    def take(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stored(self, node: Node) -> None:
        """Note that a page has entered the tree."""
        assert node.parent is not None
        namespace, tokens = self._split(node)
        if node.depth > 1:
            parent = self._hashes.get(node.parent)
        else:
            parent = root_hash(namespace) if isinstance(namespace, str) else None
        if parent is not None:
            self._hashes[node] = page_hash(parent, tokens)
            self._tell_stored(node, parent)

    def removed(self, node: Node) -> None:
        """Note that a page has left the tree."""
        name = self._hashes.pop(node, None)
        if name is None:
            return
        last = self._events[-1] if self._events else None
        if not isinstance(last, BlockRemoved):
            self._events.append(last := BlockRemoved([]))
        last.block_hashes.append(_number(name))

    def _split(self, node: Node) -> tuple[Namespace, list[int]]:
        """The namespace that a first page names, and the tokens of a page."""
        namespace = node.key[0] if len(node.key) > self._page_size else ""
        return namespace, cast(list[int], [*node.key[-self._page_size :]])

    def _tell_stored(self, node: Node, parent: bytes) -> None:
        name, before = _number(self._hashes[node]), _number(parent)
        salt, tokens = self._split(node)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and node.depth > 1 and last.block_hashes[-1] == before:
            last.block_hashes.append(name)
            last.token_ids.extend(tokens)
            if last.extra_keys is not None:
                last.extra_keys.append(None)
        else:
            after = before if node.depth > 1 else None
            keys: list[list[str] | None] | None = [[str(salt)]] if salt else None
            self._events.append(BlockStored([name], after, tokens, self._page_size, keys))


def _number(name: bytes) -> int:
    return int.from_bytes(name, "big")
