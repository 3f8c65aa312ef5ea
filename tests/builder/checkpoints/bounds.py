"""Bounds of memory and time, within which every file is read."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What reading may take beyond what the process has, and seconds of processors, which nothing else
# that the machine does prolongs.
MEMORY, SECONDS = 200 << 20, 30


@contextmanager
def bounded() -> Iterator[None]:
    """Within the bounds of memory and time: beyond, MemoryError and TimeoutError."""
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split(maxsplit=1)[0]) << 10
    limits = resource.getrlimit(resource.RLIMIT_DATA)

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"it computes for more than {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
