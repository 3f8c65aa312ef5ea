"""What is said between an engine's process and those who ask it.

A request has a range of numbers, one for each of its completions, which whoever asks chooses.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from slipstream.errors import SlipstreamError
    from slipstream.runtime.engine.request_state import Ending
    from slipstream.runtime.engine.step import TokenLogprobs
    from slipstream.runtime.request import Request


@dataclass(frozen=True, slots=True)
class Begin:
    """Run a request, whose first completion has this number."""

    number: int
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """End the request with this first number."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the completion ``index`` of the request with this first number: its text is complete."""

    number: int
    index: int


@dataclass(frozen=True, slots=True)
class Told:
    """What is new of a completion, where that is more than one token."""

    number: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What is known of a request once it has its first token, by its first number: when it was
    scheduled and had that (seconds of the machine's monotonic clock), how much of its prompt was
    cached, and the scores of that where they are wanted."""

    number: int
    first_scheduled_time: float | None
    first_token_time: float | None
    num_cached: int
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A request has ended with an error."""

    number: int
    error: SlipstreamError


@dataclass(slots=True)
class Parcel:
    """What a step has for one process: a token each of the completions in ``numbers``, and, before
    those, what is more than that."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    rest: list[Begun | Told | Failed] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine takes no more requests, and those it had have ended: why, and whether it was given
    up."""

    reason: str
    unhealthy: bool
