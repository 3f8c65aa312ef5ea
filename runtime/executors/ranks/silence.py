"""Tells a process that is stopped or stuck from one that computes."""

from __future__ import annotations

import time
from pathlib import Path

# A rank that others wait for and that has computed nothing for so many seconds is stopped or stuck.
SILENCE = 10.0


class Silence:
    """Since when processes have been asleep, or stopped, without computing anything between."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: dict[int, tuple[int | None, float]] = {}

    def stuck(self, processes: dict[int, int]) -> list[int]:
        """The ranks, of those by their processes, that have been silent for too long."""
        now, stuck = time.monotonic(), []
        for rank, process in processes.items():
            used = _asleep_after(process)
            before, since = self._seen.get(rank, (None, now))
            if used is None or used != before:
                since = now
            self._seen[rank] = used, since
            if now - since > self._seconds:
                stuck.append(rank)
        return stuck


def _asleep_after(process: int) -> int | None:
    """How many ticks a process has computed that sleeps or is stopped, see proc_pid_stat(5); None
    for one that waits for a core or a disk, and where the system does not say."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "RD" else int(fields[10]) + int(fields[11])
