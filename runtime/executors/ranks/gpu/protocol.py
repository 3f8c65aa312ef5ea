"""What the first rank tells those that follow it: all that makes work for the device.

Nothing of it is answered but ``Reserve``; a follower notes how much of it it has done. Steps are
told in memory that all map, in several regions in turns: followers may be as many steps behind as
there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream.plugins.sampling import Kind
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.step import IntArray

# A step that the host has the result of was computed by all ranks, so it was read by all; two are
# on their way at most.
REGIONS = 4
LINE = 64  # bytes, of which each follower writes how much it has done into its own


@dataclass(frozen=True, slots=True)
class Setup:
    """What a follower is told first; numbers are those of open files. Ranks ``meeting`` at a file
    find each other."""

    engine: Path
    config: RuntimeConfig
    rank: int
    link: int
    steps: tuple[int, ...]
    done: int
    meeting: Path


@dataclass(frozen=True, slots=True)
class Meet:
    """Meet the others: all have loaded their weights."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Have pages within so many bytes (None: as many as fit), and capture."""

    num_bytes: int | None


@dataclass(frozen=True, slots=True)
class Time:
    """Time the steps that are captured."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Enqueue the layers of the step of so many numbers in a region; its wanted rows are those of
    the step."""

    region: int
    numbers: int
    eager: bool


@dataclass(frozen=True, slots=True)
class Head:
    """Enqueue head and sampling of the first ``padded`` rows."""

    padded: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Rows:
    """Enqueue the head for these rows of the step."""

    rows: IntArray


@dataclass(frozen=True, slots=True)
class Close:
    """Part, and end."""


Told = Meet | Reserve | Time | Layers | Head | Rows | Close
