"""What carries pages from one process to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

Reason = Literal["none", "missing", "engine", "prompt", "room", "device"]
REASONS: dict[Reason, str] = {
    "none": "the prompt came without pages",
    "missing": "the pages are not there: they were taken before, not for so long, or elsewhere",
    "engine": "the pages are another engine's, or of another layout",
    "prompt": "the pages are another prompt's",
    "room": "the pages have no room on the way",
    "device": "the device could not copy the pages, or they were not wanted there",
}


class LostHandover(Exception):
    """Pages did not come: the prompt is to be computed where it goes on."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


class Transport(Protocol):
    """Carries slots of one engine's host memory to those of another.

    An offer has a name, 32 digits of a hexadecimal number that nobody can guess, and a ``label``
    that says whose pages they are (``runtime/handover/label.py``): who takes them says what it
    expects. Calls come from any thread, and wait for what they do.
    """

    def offer(self, name: str, label: bytes, slots: Sequence[int]) -> Mapping[str, Any]:
        """Have what slots hold taken, once, and return what a peer is to be told, as JSON. The
        slots are free when this returns. Raises ``LostHandover`` where there is no room."""
        ...

    def take(self, told: Mapping[str, Any], label: bytes, slots: Sequence[int]) -> None:
        """Fill slots with what is offered, and end the offer. What was ``told`` may come from
        anybody, and be anything. Raises ``LostHandover`` where there is no such offer, or it is
        labelled otherwise: it then stays."""
        ...

    def withdraw(self, name: str) -> None:
        """End an offer of one's own, if nobody has taken it."""
        ...

    def is_open(self, name: str) -> bool:
        """Whether an offer of one's own is still to be taken."""
        ...

    def sweep(self) -> int:
        """Free offers that nobody took in time, also those of processes that have ended; returns
        how many."""
        ...

    def close(self) -> None:
        """Let go of what the transport has."""
        ...
