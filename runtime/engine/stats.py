"""What an engine is doing and has done, as it is told to those who count."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.runtime.engine.histogram import Histogram
from slipstream.runtime.speculation.stats import SpeculationStats


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges of now and counters since the start; prefix counters are in tokens.

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


@dataclass(frozen=True, slots=True)
class EngineStats(SchedulerStats):
    """Those of the scheduler, and of all steps: how many tokens they had, and seconds; and of
    drafts, where the host makes some."""

    step_tokens: Histogram
    step_seconds: Histogram
    speculation: SpeculationStats | None = None
