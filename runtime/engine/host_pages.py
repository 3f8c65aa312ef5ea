"""Pages that have left the device, in memory of the host: what is where, and what goes next."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from slipstream.runtime.engine.window_group import WindowGroup, WindowPages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Transfer(NamedTuple):
    """A page of one cache to be copied to a slot of the host (``stores``), or from there."""

    cache: str
    page: int
    slot: int
    stores: bool


def page_transfers(
    caches: Sequence[str],
    pages: Sequence[int],
    windows: Iterable[tuple[WindowGroup, WindowPages]],
    index: int,
    slot: int,
    stores: bool,
) -> list[Transfer]:
    """Between a slot and page ``index`` of a sequence: the number that the full group has for it
    among ``pages``, and that of every window that still reaches it."""
    made = [Transfer(cache, pages[index], slot, stores) for cache in caches]
    for group, held in windows:
        if index >= held.first:
            made += [Transfer(cache, held.pages[index], slot, stores) for cache in group.caches]
    return made


class Record(NamedTuple):
    """What a slot holds: the page of this name, after that of the name ``parent``, and a bit for
    every group with a window that has its part of it here."""

    slot: int
    digest: bytes
    parent: bytes
    windows: int


class Journal(Protocol):
    """Where it stands what the slots hold, if they outlive the process."""

    def found(self) -> Sequence[Record]:
        """What slots held at the start, least recently stored first."""
        ...

    def note(self, record: Record) -> None:
        """A slot holds this, all of it."""
        ...

    def erase(self, slot: int) -> None:
        """A slot holds nothing, and is about to be written."""
        ...

    def is_intact(self, slot: int) -> bool:
        """Whether a slot that was found holds what was noted."""
        ...


class HostSpace(NamedTuple):
    """Memory of the host for ``num_slots`` pages of every cache, and its journal if it has one.

    Its ``parts`` are bytes ``[num_slots, n]`` each: what a slot holds is one row of all of them.
    """

    num_slots: int
    journal: Journal | None = None
    parts: Sequence[NDArray[np.uint8]] = ()


@dataclass(slots=True, eq=False)
class HostPage:
    """A page on the host. One that is ``held`` keeps its slot; it is read once it has ``landed``,
    and, if it was ``found`` at the start, is intact."""

    record: Record
    landed: bool = False
    held: bool = False
    found: bool = False


class HostPages:
    """Which page each slot holds; the least recently used goes where there is no other room.

    A path leaves the tree from its deep end, so the end of a text goes from here before its
    beginning.
    """

    def __init__(self, space: HostSpace) -> None:
        self.num_slots = space.num_slots
        self.journal = space.journal
        self._pages: OrderedDict[bytes, HostPage] = OrderedDict()
        found = space.journal.found() if space.journal else ()
        for record in found:
            self._pages[record.digest] = HostPage(record, landed=True, found=True)
        taken = {page.record.slot for page in self._pages.values()}
        self._free = [slot for slot in reversed(range(space.num_slots)) if slot not in taken]

    def __len__(self) -> int:
        return len(self._pages)

    def put(self, digest: bytes, parent: bytes, windows: int) -> HostPage | None:
        """A new place for a page; None if it is here already, or nothing can go for it."""
        known = self._pages.get(digest)
        if known is not None:
            self._pages.move_to_end(digest)
            if known.held or known.record.windows | windows == known.record.windows:
                return None
            self._drop(known)
        slot = self._take()
        if slot is None:
            return None
        page = self._pages[digest] = HostPage(Record(slot, digest, parent, windows))
        return page

    def get(self, digest: bytes) -> HostPage | None:
        """The page of that name, if it can be read."""
        page = self._pages.get(digest)
        if page is None or not page.landed:
            return None
        if page.found:
            assert self.journal is not None
            if not self.journal.is_intact(page.record.slot):
                self._drop(page)
                return None
            page.found = False
        return page

    def hold(self, pages: Sequence[HostPage]) -> None:
        """Keep what is about to be read, which is the path of a text: its end goes first."""
        for page in reversed(pages):
            page.held = True
            self._pages.move_to_end(page.record.digest)

    def let_go(self, pages: Sequence[HostPage]) -> None:
        """Undo ``hold``."""
        for page in pages:
            page.held = False

    def land(self, pages: Iterable[HostPage]) -> None:
        """Note that the steps which stored these have ended well."""
        for page in pages:
            page.landed = True
            if self.journal is not None and self._is_here(page):
                self.journal.note(page.record)

    def drop(self, pages: Iterable[HostPage]) -> None:
        """Forget what a step that failed was to store."""
        for page in pages:
            if self._is_here(page):
                self._drop(page)

    def forget(self, digests: Iterable[bytes]) -> None:
        """Forget pages, whether or not they are here, and all that were computed from them."""
        after: dict[bytes, list[bytes]] = defaultdict(list)
        for page in self._pages.values():
            after[page.record.parent].append(page.record.digest)
        stack = list(digests)
        while stack:
            digest = stack.pop()
            stack += after.pop(digest, ())
            if digest in self._pages:
                self._drop(self._pages[digest])

    def check_invariants(self) -> None:
        """Assert that each slot has one owner (for tests)."""
        slots = [page.record.slot for page in self._pages.values()]
        assert sorted([*self._free, *slots]) == list(range(self.num_slots)), "a slot is lost"
        assert all(page.record.digest == digest for digest, page in self._pages.items())
        assert not any(page.held for page in self._pages.values()), "a page is held for ever"

    def _is_here(self, page: HostPage) -> bool:
        return self._pages.get(page.record.digest) is page

    def _take(self) -> int | None:
        if not self._free:
            oldest = next((page for page in self._pages.values() if not page.held), None)
            if oldest is None:
                return None
            self._drop(oldest)
        return self._free.pop()

    def _drop(self, page: HostPage) -> None:
        del self._pages[page.record.digest]
        self._free.append(page.record.slot)
        if self.journal is not None:
            self.journal.erase(page.record.slot)
