"""Where the seconds of a start go: a line of the log for each of its phases.

``slipstream serve --verbose`` shows them; the logger is ``slipstream.phases``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
_STAT = Path("/proc/self/stat")
_START_TIME = 19  # the place of a process's start among what follows its name; see proc(5)
_imported = time.monotonic()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Log how long what is done inside takes, and how old the process is then; phases may lie in
    each other, and beside each other in threads."""
    began = time.monotonic()
    try:
        yield
    finally:
        if log.isEnabledFor(logging.INFO):
            took = time.monotonic() - began
            log.info("%s took %.3f s, until %.3f s of the process", name, took, process_age())


def process_age() -> float:
    """Seconds since this process was started; where a system does not tell, since this module was
    imported."""
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()
        ticks = int(fields[_START_TIME])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.monotonic() - _imported
