"""How many tokens the steps of an engine have, and how long they take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from slipstream.runtime.engine.histogram import Histogram

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class StepStats:
    """Counts steps that landed, those that failed included.

    A step takes from its start, or from the landing of the step before it if that is later, to its
    own landing: where the device runs ahead, steps that wait for each other are not counted twice.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tokens = Histogram(STEP_TOKENS)
        self.seconds = Histogram(STEP_SECONDS)
        self._clock = clock
        self._starts: deque[float] = deque()
        self._landed = float("-inf")

    def began(self) -> None:
        """A step was started."""
        self._starts.append(self._clock())

    @property
    def since_landing(self) -> float:
        """Seconds since a step landed."""
        return self._clock() - self._landed

    def landed(self, tokens: int) -> float:
        """The first of those on their way is over; it had so many ``tokens``. Returns the seconds
        that it took."""
        now = self._clock()
        seconds = now - max(self._starts.popleft(), self._landed)
        self.tokens.observe(tokens)
        self.seconds.observe(seconds)
        self._landed = now
        return seconds
