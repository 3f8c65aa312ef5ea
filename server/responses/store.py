"""Answers that later requests go on with, in memory."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_PUT, _GET, _POP = "responses.put", "responses.get", "responses.pop"


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


class Answers(Protocol):
    """Where a server keeps answers, whichever of its processes they come from."""

    def put(self, response_id: str, stored: Stored) -> None:
        """Keep an answer; from any thread."""
        ...

    async def get(self, response_id: str) -> Stored | None:
        """An answer that is still kept."""
        ...

    async def pop(self, response_id: str) -> bool:
        """Forget an answer; whether it was kept."""
        ...


class LocalStore:
    """``Answers`` of a server of one process."""

    def __init__(self, store: Store) -> None:
        self.put = store.put
        self._store = store

    async def get(self, response_id: str) -> Stored | None:
        """An answer that is still kept."""
        return self._store.get(response_id)

    async def pop(self, response_id: str) -> bool:
        """Forget an answer; whether it was kept."""
        return self._store.pop(response_id)


class RemoteStore:
    """``Answers`` that another process keeps, which answers questions with ``answers_of``."""

    def __init__(self, ask: Callable[[str, Any], Coroutine[Any, Any, Any]]) -> None:
        """``ask`` belongs to the running event loop."""
        self._ask = ask
        self._event_loop = asyncio.get_running_loop()

    def put(self, response_id: str, stored: Stored) -> None:
        """Keep an answer; from any thread."""
        asking = self._ask(_PUT, (response_id, stored))
        asyncio.run_coroutine_threadsafe(asking, self._event_loop)

    async def get(self, response_id: str) -> Stored | None:
        """An answer that is still kept."""
        found: Stored | None = await self._ask(_GET, response_id)
        return found

    async def pop(self, response_id: str) -> bool:
        """Forget an answer; whether it was kept."""
        found: bool = await self._ask(_POP, response_id)
        return found


def answers_of(
    store: Store, settled: Callable[[], Awaitable[object]]
) -> dict[str, Callable[[Any], Awaitable[Any]]]:
    """The questions that a ``RemoteStore`` asks, and who answers them; ``settled`` returns once
    all that processes have said before has been heard."""

    async def put(entry: tuple[str, Stored]) -> None:
        store.put(*entry)

    async def get(response_id: str) -> Stored | None:
        found = store.get(response_id)
        if found is None:  # it may be on its way from the process that made it
            await settled()
            found = store.get(response_id)
        return found

    async def pop(response_id: str) -> bool:
        return await get(response_id) is not None and store.pop(response_id)

    return {_PUT: put, _GET: get, _POP: pop}


def _size(value: object) -> int:
    """Characters of all texts in a value of JSON, and some for what holds them."""
    if isinstance(value, str):
        return 50 + len(value)
    if isinstance(value, Mapping):
        return 50 + sum(_size(item) for item in value.values())
    if isinstance(value, Sequence):
        return 50 + sum(map(_size, value))
    return 50
