"""What has been handed over, as it is told to those who count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Way:
    """One of the two ways: how many prompts, bytes of pages, and seconds of copying them between
    slots and transport."""

    prompts: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class HandoverStats:
    """Counters since the start. By the reasons of ``LostHandover``, ``unsent`` prompts could not be
    offered, and ``lost`` ones were computed where they went on. ``expired`` offers, of any worker,
    were freed because nobody took them."""

    sent: Way = field(default_factory=Way)
    received: Way = field(default_factory=Way)
    unsent: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    expired: int = 0
