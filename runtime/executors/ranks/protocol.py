"""What the process of an engine asks those of its ranks, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream.errors import SlipstreamError
from slipstream.runtime.config import RuntimeConfig

SLOT_BYTES = 1 << 20  # of what ranks exchange at once: it stays in the cache of a core


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank is told first; numbers are those of open files."""

    engine: Path
    config: RuntimeConfig
    rank: int
    link: int
    exchange: int
    steps: int
    results: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Have pages within so many bytes; the answer is how many pages."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """Run the step of so many numbers; the first rank's answer is what it put into the results."""

    numbers: int


@dataclass(frozen=True, slots=True)
class Made:
    """An output of a step, where it lies in the results."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


Answer = int | list[Made] | SlipstreamError
