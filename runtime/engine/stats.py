"""What an engine is doing and has done, as it is told to those who count."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.runtime.engine.histogram import Histogram
from slipstream.runtime.speculation.stats import SpeculationStats


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that went one way, and seconds of the device, or of the loop, that this took."""

    num_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_bytes + other.num_bytes, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges of now and counters since the start; those of prefixes and of the host are in tokens:
    what the prefix tree has not is asked of the host. ``handed`` tokens of prompts are neither, as
    other engines have computed them.

    Of those that wait, ``num_deferred`` leave the last rows to others; the rest lacks room.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_deferred: int
    num_pages: int
    host_queries: int = 0
    host_hits: int = 0
    handed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats(SchedulerStats):
    """Those of the scheduler, and of all steps: how many tokens they had, and seconds; of drafts,
    where the host makes some, and of pages that go to the host and come back."""

    step_tokens: Histogram
    step_seconds: Histogram
    speculation: SpeculationStats | None = None
    stored: Traffic = Traffic()
    loaded: Traffic = Traffic()
