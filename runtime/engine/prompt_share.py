"""How many tokens of prompts go into a step that answers on their way wait for.

Without a bound a step has as many as there is room for, and takes as long: every stream stands
still while somebody's book is read. A fixed bound is right for one device and one load. Here the
bound is time, by what steps have cost of late: prompts may make a step take about twice as long as
one without them will, once all that wait speak, so that a token comes at most about twice as late
as it would. So of requests that begin together the first are not held to the pace of a few, which
would cost steps. A burst is over soon; where prompts wait for seconds on end there are more of them
than that share of the device can compute, and it grows for as long as they do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

_LEAST = 16  # tokens: a prompt always goes on
_SHARE = 0.9  # of a step's time without prompts
_SHORT = 0.1  # seconds of computing: what waits less than that is no queue
_BURST = 4.0  # seconds for which there may be a queue before the share grows
_LONGEST = 16.0  # seconds that are remembered of it
_SCALE = (1.0, 1 / 64, 1 / 512)  # what makes the three parts of a step's time about alike
_RATE = 0.5  # how much of an error is corrected at once
# Times what was expected: more counts as so much, as it need not be of the step's doing: graphs are
# captured when they are first needed.
_OUTLIER = 1.5
_FIRST = 8  # steps after which something is expected


class StepTimes:
    """What a step takes: so much in any case, for each token of a decode, and for each of a prompt.

    The three are corrected after every step, in the direction of what that step had of each
    (normalized least mean squares): what steps do not vary in stays as it was.
    """

    def __init__(self) -> None:
        self._seconds = [0.0, 0.0, 0.0]  # in units of _SCALE
        self._steps = 0

    def add(self, decodes: int, prompts: int, seconds: float) -> None:
        """Take a step of so many tokens into account."""
        parts = [size * scale for size, scale in zip((1, decodes, prompts), _SCALE, strict=True)]
        expected = sum(a * b for a, b in zip(self._seconds, parts, strict=True))
        self._steps += 1
        if self._steps > _FIRST and expected:
            seconds = min(seconds, _OUTLIER * expected)
        gain = _RATE * (seconds - expected) / sum(part * part for part in parts)
        pairs = zip(self._seconds, parts, strict=True)
        self._seconds = [max(0.0, known + gain * part) for known, part in pairs]

    def of_decodes(self, tokens: int) -> float:
        """Seconds of a step with so many tokens, none of them a prompt's."""
        return self._seconds[0] + self._seconds[1] * _SCALE[1] * tokens

    @property
    def of_prompt_token(self) -> float:
        """Seconds that a token of a prompt adds."""
        return self._seconds[2] * _SCALE[2]


class PromptShare:
    """Bounds the prompts of steps by what steps cost."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        """A device that pads steps with prompts does so to the next of these ``sizes``, in
        tokens."""
        self._sizes = sizes
        self._times = StepTimes()
        self._queued = 0.0  # seconds in which there was, less those in which there was none

    def landed(self, decodes: int, prompts: int, seconds: float, queued: bool) -> None:
        """Take into account what a step took that had so many tokens of either; ``queued``: which
        was planned beside a queue."""
        self._times.add(decodes, prompts, seconds)
        total = self._queued + (seconds if queued else -seconds)
        self._queued = min(max(0.0, total), _LONGEST)

    def is_queue(self, waiting: int) -> bool:
        """Whether so many tokens of prompts that wait are a queue."""
        return waiting * self._times.of_prompt_token > _SHORT

    def most(self, decodes: int, speaking: int, silent: int, waiting: int) -> int | None:
        """The most tokens of prompts beside ``decodes`` tokens of as many sequences as are
        ``speaking``, where ``silent`` ones have yet to begin, and so many tokens of prompts are
        ``waiting``; None: no bound, as nothing is known yet."""
        each = self._times.of_prompt_token
        if not each:
            return None
        share = _SHARE * max(1.0, 1.0 + self._queued - _BURST)
        pace = self._times.of_decodes(decodes + decodes * silent // speaking)
        spare = (1.0 + share) * pace - self._times.of_decodes(decodes)
        most = max(_LEAST, int(spare / each))
        return most if most >= waiting else self._without_padding(decodes, most)

    def _without_padding(self, decodes: int, most: int) -> int:
        """As many as fill the step to a size, if that is not far from it."""
        index = bisect_right(self._sizes, decodes + most)
        if not 0 < index < len(self._sizes):
            return most
        filled = self._sizes[index - 1] - decodes
        return filled if filled > most // 2 else most
