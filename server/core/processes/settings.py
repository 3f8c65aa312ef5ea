"""How the interpreter of a process that serves is set."""

from __future__ import annotations

import gc
import logging
import sys

# After which a thread that computes lets another go on. Tokens pass through two threads, each of
# which would wait Python's 5 ms for whoever reads or writes a large request.
_SWITCH_SECONDS = 0.0005


def settle() -> None:
    """Set up a process that serves, once all is imported."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    # Its own lines about start and end are told by ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def freeze() -> None:
    """Spare the collector of garbage what has been made until now, and stays: hundreds of thousands
    of objects, which take it a tenth of a second to look at."""
    gc.collect()
    gc.freeze()
