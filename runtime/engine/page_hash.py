"""Names of pages that agree between processes and restarts: a hash of all tokens to their end."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

from slipstream.runtime.engine.radix_tree import Node

PRIVATE = b""


@lru_cache(maxsize=64)
def root_hash(namespace: str) -> bytes:
    """What the first page of a caller's namespace follows."""
    return sha256(namespace.encode()).digest()


def page_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name, 32 bytes, of a page of ``tokens`` after the page of that name.

    A caller who finds two texts of one name could read what others have asked: so it is SHA-256.
    """
    return sha256(parent + struct.pack(f"<{len(tokens)}i", *tokens)).digest()


def node_hash(node: Node, page_size: int) -> bytes:
    """The name of a page in the tree, kept there; ``PRIVATE`` in the namespace of siblings, which
    nobody else ever asks for."""
    chain: list[Node] = []
    parent: Node | None = node
    while parent is not None and parent.parent is not None and parent.digest is None:
        chain.append(parent)
        parent = parent.parent
    for each in reversed(chain):
        each.digest = _name(each, page_size)
    assert node.digest is not None, "the root is no page"
    return node.digest


def _name(node: Node, page_size: int) -> bytes:
    """The same where the parent's is known."""
    key, parent = node.key, node.parent
    assert parent is not None
    above: bytes | None = parent.digest
    if parent.parent is None:
        namespace = key[0] if len(key) > page_size else ""
        above = root_hash(namespace) if isinstance(namespace, str) else PRIVATE
    assert above is not None
    tokens = [token for token in key[-page_size:] if isinstance(token, int)]
    return page_hash(above, tokens) if above else PRIVATE
