"""Times the candidate tactics of products on the GPU that is there, and keeps the quickest.

Every candidate runs in a captured graph over weights that together exceed the L2 cache, as they do
in a model: a weight that stays in the cache would favour the wrong kernels.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from slipstream.plugins.cuda.precompile import compile_kernels, record
from slipstream.plugins.linear.cuda.tactics import Tactic, Tactics
from slipstream.plugins.linear.cuda.weight import DeviceWeight

log = logging.getLogger(__name__)
_COLD_BYTES = 160 << 20  # three times the L2 cache of an H100
_LAUNCHES = 64
_REPLAYS = 5
_HOPELESS = 1.5  # times as slow as another in the first replay: the others are left out


class Problem(Protocol):
    """The products of one shape in a model."""

    @property
    def weights(self) -> tuple[DeviceWeight, ...]:
        """Cold ones, all of one format; see ``cold``."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The numbers of tokens that have a tactic each."""

    def key(self, bucket: int) -> str:
        """The key in the table of tactics."""

    def candidates(self, tokens: int, capability: tuple[int, int]) -> list[Tactic]:
        """What is worth timing, the default first."""

    def calls(self, tokens: int, tactics: Sequence[Tactic]) -> list[Callable[[int], Tensor]]:
        """For each tactic a launch on the weight of a number, all of them on the same input."""

    def nbytes(self, tokens: int) -> float:
        """Bytes that a launch must read, those of x not counted."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one launch with cold weights."""

    tactic: Tactic
    seconds: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """The timings of one problem and number of tokens, quickest first, and the default tactic."""

    problem: Problem
    tokens: int
    timings: list[Timing]
    usual: Tactic


def time_tactics(problem: Problem, tokens: int, tactics: Sequence[Tactic]) -> list[Timing]:
    """Every tactic that runs, quickest first."""
    timings: list[Timing] = []
    for tactic, call in zip(tactics, problem.calls(tokens, tactics), strict=True):
        if _runs(call):
            best = min((timing.seconds for timing in timings), default=math.inf)
            timings.append(Timing(tactic, _seconds(call, len(problem.weights), best)))
    return sorted(timings, key=lambda timing: timing.seconds)


def tune(problems: Sequence[Problem], buckets: Sequence[int], table: Tactics) -> Iterator[Tuned]:
    """Put the quickest tactic of every problem and of those of ``buckets`` that it has into
    ``table``, one after the other; who stops to ask keeps those that came."""
    choices = {
        (index, tokens): problem.candidates(tokens, table.capability)
        for tokens in buckets
        for index, problem in enumerate(problems)
        if tokens in problem.buckets
    }
    choices = {key: tactics for key, tactics in choices.items() if len(tactics) > 1}

    def launch_all(key: tuple[int, int]) -> None:
        for call in problems[key[0]].calls(key[1], choices[key]):
            call(0)

    with torch.no_grad():
        compile_kernels(record([partial(launch_all, key) for key in choices]), table.capability)
    for (index, tokens), tactics in choices.items():
        problem = problems[index]
        timings = time_tactics(problem, tokens, tactics)
        table.entries[problem.key(tokens)] = timings[0].tactic
        yield Tuned(problem, tokens, timings, usual=tactics[0])


def _runs(call: Callable[[int], Tensor]) -> bool:
    """Whether a candidate compiles and fits this GPU."""
    try:
        with torch.no_grad():
            call(0)
    except Exception as error:  # noqa: BLE001 - a candidate that does not fit is no candidate
        log.info("a candidate does not run: %s", str(error)[:200])
        return False
    return True


def _seconds(call: Callable[[int], Tensor], weights: int, best: float) -> float:
    launches = max(weights, _LAUNCHES // 4)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        for index in range(launches):
            call(index)
    graph.replay()

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / launches

    return typical(seconds, best)


def typical(seconds: Callable[[], float], best: float) -> float:
    """The median of several replays, or the first if that is much slower than ``best``."""
    first = seconds()
    if first > _HOPELESS * best:
        return first
    return statistics.median([first, *(seconds() for _ in range(_REPLAYS - 1))])


def cold(weights: Sequence[DeviceWeight]) -> tuple[DeviceWeight, ...]:
    """Enough weights of one shape that a round of them finds none in the cache: copies if need
    be."""
    size = sum(weight.codes.nbytes for weight in weights)
    copies = -(-_COLD_BYTES // max(size, 1))
    made = list(weights)
    for _ in range(min(copies, _LAUNCHES) - 1):
        made += [weight.copy() for weight in weights]
    return tuple(made)
