"""Answers that later requests go on with, in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer as JSON, and the items that it answers, those of earlier requests included."""

    body: bytes
    items: Sequence[dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.body) + _size(self.items)


class Store:
    """At most so many answers and bytes; what was not asked for the longest makes room.

    Any thread may use it.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, response_id: str, stored: Stored) -> None:
        """Keep an answer; one that is too large in itself is not."""
        size = stored.size
        if size > self._max_bytes:
            return
        with self._lock:
            self._entries[response_id] = stored, size
            self._bytes += size
            while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._bytes -= freed

    def get(self, response_id: str) -> Stored | None:
        """An answer that is still kept."""
        with self._lock:
            if response_id not in self._entries:
                return None
            self._entries.move_to_end(response_id)
            return self._entries[response_id][0]

    def pop(self, response_id: str) -> bool:
        """Forget an answer; whether it was kept."""
        with self._lock:
            found = self._entries.pop(response_id, None)
            self._bytes -= found[1] if found else 0
            return found is not None


def _size(value: object) -> int:
    """Characters of all texts in a value of JSON, and some for what holds them."""
    if isinstance(value, str):
        return 50 + len(value)
    if isinstance(value, Mapping):
        return 50 + sum(_size(item) for item in value.values())
    if isinstance(value, Sequence):
        return 50 + sum(map(_size, value))
    return 50
