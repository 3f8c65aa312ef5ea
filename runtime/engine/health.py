"""Whether the device behind an engine still works."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from slipstream.runtime.executors.base import WatchedExecutor
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams

# One failing step may be a request's own fault (memory for an odd shape) and takes the innocent
# ones beside it along; when these come again and fail as often, it is not theirs.
MAX_FAILURES = 5
PROBE = "\0probe"  # the id of a request of the loop's own


def probe(pooling: PoolingParams | None) -> Request:
    """What is asked after a row has failed: one token, or to pool one, which only a broken engine
    cannot compute.

    A row's failure may be its request's own fault. Where all rows fail, as with weights that were
    overwritten, no step does, and yet nothing works.
    """
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    return Request(PROBE, [0], params, priority=-sys.maxsize, output_kind="final", pooling=pooling)


def forked_from(process: int) -> str:
    """Why nothing can run here of an engine that ``process``, which is another one, loaded: threads
    and devices are not there in a process that was forked afterwards."""
    return (
        f"the engine was loaded by process {process}, and this is process {os.getpid()}, which was"
        " forked from it and has neither its threads nor its device. Load the engine after the"
        " fork, or start the process by spawn"
    )


class Health:
    """Judges a device by its steps; what has gone wrong is not forgotten.

    ``began`` and ``ended`` belong to the engine's thread; ``reason`` may be read from any, so that
    a step that never ends is noticed.
    """

    def __init__(
        self, step_timeout: float, clock: Callable[[], float], executor: object = None
    ) -> None:
        """A device may take ``step_timeout`` seconds of ``clock`` to answer; an ``executor`` that
        is watched says by itself when it is gone."""
        self._watched = executor if isinstance(executor, WatchedExecutor) else None
        self._timeout = step_timeout
        self._clock = clock
        self._waiting_since: float | None = None
        self._failures = 0
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the device is given up; None: it is healthy."""
        if self._reason is None and self._watched is not None:
            self._reason = self._watched.lost
        since = self._waiting_since
        if self._reason is None and since is not None:
            waited = self._clock() - since
            if waited > self._timeout:
                self._reason = (
                    f"the device has not answered for {waited:.0f} seconds (step_timeout is"
                    f" {self._timeout:g}). Restart the engine"
                )
        return self._reason

    def began(self) -> None:
        """The engine turns to the device and waits for it."""
        self._waiting_since = self._clock()

    def ended(self) -> None:
        """The engine has what it waited for."""
        self._waiting_since = None

    def succeeded(self) -> None:
        """A step has landed."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """A step, or the probe in it, has failed."""
        self._failures += 1
        if self._failures >= MAX_FAILURES and self._reason is None:
            self._reason = (
                f"the device failed {self._failures} steps in a row, at last with: {error}."
                " Restart the engine"
            )
