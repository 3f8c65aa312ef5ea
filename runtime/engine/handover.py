"""Pages of one prompt that come from another engine, or go to one, through slots of the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.runtime.engine.host_pages import Transfer, page_transfers
from slipstream.runtime.engine.window_group import WindowGroup

if TYPE_CHECKING:
    from slipstream.runtime.engine.kv_cache import Allocation


@dataclass(slots=True, eq=False)
class Handover:
    """Slots that belong to one request, each for a page of the first ``num_tokens`` of its prompt:
    all but the last, which whoever goes on computes for its logits. The last page may be partly
    filled.

    If it ``stores``, the pages go to the slots once the prompt is computed; else they are there,
    and come from the slots in place of being computed. From the time that the request is
    ``submitted`` the engine says by ``settled``, once and from its own thread, that it uses the
    slots no more, and whether the pages went where they were to go. They are ``queued`` from when a
    step is to move them.
    """

    slots: Sequence[int]
    num_tokens: int
    stores: bool
    settled: Callable[[bool], None]
    submitted: bool = False
    queued: bool = False

    def leave(self) -> None:
        """Settle it, unless the engine does: for whoever has made it."""
        if not self.submitted:
            self.give_up()

    def give_up(self) -> None:
        """Settle it, unless a step that moves the pages does: for the engine."""
        if not self.queued:
            self.queued = True
            self.settled(False)


class Handovers:
    """Makes transfers of handovers, for the next step that is planned; it ``waits`` where there are
    some to take."""

    def __init__(self, caches: tuple[str, ...], windows: tuple[WindowGroup, ...]) -> None:
        self._caches = caches
        self._windows = windows
        self._stores: list[Transfer] = []
        self._loads: list[Transfer] = []
        self._moving: list[Handover] = []
        self.waits = False

    def store(self, handover: Handover, allocation: Allocation) -> None:
        """Bring what a sequence has computed to the slots; its pages may be given to others at
        once, as those write them after the next step has begun."""
        self._stores += self._copies(handover, allocation, 0)
        self._begin(handover)

    def load(self, handover: Handover, allocation: Allocation, first: int) -> None:
        """Bring pages from number ``first`` on into a sequence's own, which has room for them."""
        self._loads += self._copies(handover, allocation, first)
        self._begin(handover)

    def take(self) -> tuple[list[Transfer], list[Transfer], list[Handover]]:
        """What a step is to make before and after its other transfers, and whose that is."""
        taken = self._stores, self._loads, self._moving
        self._stores, self._loads, self._moving, self.waits = [], [], [], False
        return taken

    def _begin(self, handover: Handover) -> None:
        handover.queued = True
        self._moving.append(handover)
        self.waits = True

    def _copies(self, handover: Handover, allocation: Allocation, first: int) -> list[Transfer]:
        windows = list(zip(self._windows, allocation.windows, strict=True))
        numbered = list(enumerate(handover.slots))[first:]
        return [
            transfer
            for index, slot in numbered
            for transfer in page_transfers(
                self._caches, allocation.pages, windows, index, slot, handover.stores
            )
        ]
