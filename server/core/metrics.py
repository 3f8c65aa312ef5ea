"""What a server counts, with vLLM's metric names under the prefix ``slipstream:``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slipstream.runtime.engine.histogram import Histogram
from slipstream.runtime.engine.step_stats import STEP_SECONDS, STEP_TOKENS
from slipstream.runtime.speculation.stats import SpeculationStats
from slipstream.server.core.http_metrics import HttpMetrics, HttpTally
from slipstream.server.core.offload_metrics import OffloadMetrics
from slipstream.server.core.pickers import PickerMetrics

if TYPE_CHECKING:
    from slipstream.runtime.config import RuntimeConfig
    from slipstream.runtime.engine.stats import EngineStats
    from slipstream.runtime.request import CompletionOutput, RequestMetrics, RequestOutput

PREFIX = "slipstream:"
_Kind = Literal["gauge", "counter", "histogram"]
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_TOKEN_SECONDS = (*_STEPS, 1, 2.5, 5, 10, 20, 40, 80)
_REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20,
                    30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: ``buckets`` are the upper bounds of a histogram, ``label`` its own label."""

    kind: _Kind
    help: str
    buckets: tuple[float, ...] = ()
    label: str | None = None


FAMILIES: Mapping[str, Family] = {
    "engine_healthy": Family("gauge", "1 while the engine takes requests, 0 from then on."),
    "num_requests_running": Family("gauge", "Sequences in the running batch."),
    "num_requests_waiting": Family("gauge", "Sequences waiting to be run."),
    "num_requests_waiting_by_reason": Family(
        "gauge",
        "Why sequences wait: for room, or to leave it to other requests.",
        label="reason",
    ),
    "kv_cache_usage_perc": Family("gauge", "KV pages in use; 1 means all of them."),
    "prefix_cache_queries": Family("counter", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": Family("counter", "Prompt tokens found in the prefix cache."),
    "num_preemptions": Family("counter", "Sequences that gave their pages to others."),
    "spec_decode_num_drafts": Family("counter", "Times that a sequence had drafts in a step."),
    "spec_decode_num_draft_tokens": Family("counter", "Drafts that were verified."),
    "spec_decode_num_accepted_tokens": Family("counter", "Drafts that were right."),
    "spec_decode_num_accepted_tokens_per_pos": Family(
        "counter", "Drafts that were right, by their place in a run.", label="position"
    ),
    "prompt_tokens": Family("counter", "Prompt tokens of requests that were answered."),
    "generation_tokens": Family("counter", "Tokens generated."),
    "request_success": Family("counter", "Completions that ended.", label="finished_reason"),
    "time_to_first_token_seconds": Family(
        "histogram", "From arrival to the first token.", _REQUEST_SECONDS
    ),
    "inter_token_latency_seconds": Family("histogram", "Between two tokens.", _TOKEN_SECONDS),
    "time_per_output_token_seconds": Family(
        "histogram", "The older name of inter_token_latency_seconds.", _TOKEN_SECONDS
    ),
    "request_prompt_tokens": Family("histogram", "Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": Family("histogram", "Tokens of a completion.", _TOKENS),
    "request_params_n": Family("histogram", "Completions of a request.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": Family(
        "histogram", "max_tokens of a request, where it is bounded.", _TOKENS
    ),
    "e2e_request_latency_seconds": Family(
        "histogram", "From arrival to the last token.", _REQUEST_SECONDS
    ),
    "request_queue_time_seconds": Family(
        "histogram", "From arrival to the first step.", _REQUEST_SECONDS
    ),
    "request_prefill_time_seconds": Family(
        "histogram", "From the first step to the first token.", _REQUEST_SECONDS
    ),
    "request_decode_time_seconds": Family(
        "histogram", "From the first token to the last.", _REQUEST_SECONDS
    ),
    "request_inference_time_seconds": Family(
        "histogram", "From the first step to the last token.", _REQUEST_SECONDS
    ),
}
# Counted once, under its newer name.
_OLDER = {"time_per_output_token_seconds": "inter_token_latency_seconds"}
# Those that the engine counts itself, step by step.
STEPS: Mapping[str, Family] = {
    "iteration_tokens_total": Family("histogram", "Tokens of a step.", STEP_TOKENS),
    "step_time_seconds": Family("histogram", "From one step to the next.", STEP_SECONDS),
}
# Which two times of a request a histogram measures.
_SPANS: Mapping[str, tuple[str, str]] = {
    "e2e_request_latency_seconds": ("arrival_time", "finished_time"),
    "request_queue_time_seconds": ("arrival_time", "first_scheduled_time"),
    "request_prefill_time_seconds": ("first_scheduled_time", "first_token_time"),
    "request_decode_time_seconds": ("first_token_time", "finished_time"),
    "request_inference_time_seconds": ("first_scheduled_time", "finished_time"),
}


class Engine(Protocol):
    """Whose gauges are read."""

    @property
    def stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        ...

    @property
    def config(self) -> RuntimeConfig:
        """How the engine was set up."""
        ...

    @property
    def unhealthy(self) -> str | None:
        """Why the engine should be restarted, None while it is well."""
        ...

    @property
    def closed(self) -> str | None:
        """Why the engine takes no more requests, None while it does."""
        ...


@dataclass(frozen=True, slots=True)
class EngineState:
    """What was read of an engine."""

    stats: EngineStats
    config: RuntimeConfig
    unhealthy: str | None
    closed: str | None


class Tally:
    """What one process counts of requests, as its watches tell; they belong to one thread."""

    def __init__(self) -> None:
        self.histograms = {
            name: Histogram(family.buckets)
            for name, family in FAMILIES.items()
            if family.kind == "histogram" and name not in _OLDER
        }
        self.prompt_tokens = self.generation_tokens = 0
        self.finished: Counter[str] = Counter(
            dict.fromkeys(("stop", "length", "abort", "error"), 0)
        )

    @property
    def mean_latency(self) -> float:
        """Mean seconds from the arrival of a request to its last token; 0 before the first."""
        latency = self.histograms["e2e_request_latency_seconds"]
        return latency.sum / max(1, latency.count)

    def watch(self, max_tokens: int | None = None) -> RequestWatch:
        """An observer of one request, which asks for so many tokens."""
        return RequestWatch(self, max_tokens)

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Add a value to a histogram."""
        self.histograms[name].observe(value, times)

    def add(self, other: Tally) -> None:
        """Count what another has counted, too."""
        for name, histogram in other.histograms.items():
            self.histograms[name].add(histogram)
        self.prompt_tokens += other.prompt_tokens
        self.generation_tokens += other.generation_tokens
        self.finished.update(other.finished)


class EngineMetrics(Tally, Collector):
    """A tally with the metrics of its engine, which are read when asked for; ``collect`` may be
    called from any thread."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        super().__init__()
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every family of ``FAMILIES`` and ``STEPS`` in the form of prometheus-client, and how the
        cache was set up."""
        stats = self._engine.stats
        values = self._values(stats)
        steps = {
            "iteration_tokens_total": stats.step_tokens,
            "step_time_seconds": stats.step_seconds,
        }
        for name, family in {**FAMILIES, **STEPS}.items():
            if family.kind == "histogram":
                histogram = (self.histograms | steps)[_OLDER.get(name, name)]
                yield self._histogram(name, family, histogram)
            else:
                yield self._scalar(name, family, values[name])
        yield self._cache_config(stats.num_pages)

    def _histogram(self, name: str, family: Family, histogram: Histogram) -> Metric:
        metric = HistogramMetricFamily(PREFIX + name, family.help, labels=["model_name"])
        metric.add_metric([self._model_name], histogram.buckets(), histogram.sum)
        return metric

    def _cache_config(self, num_pages: int) -> Metric:
        """vLLM's info: the values are labels, of a gauge that is 1."""
        config = self._engine.config
        labels = {
            "model_name": self._model_name,
            "block_size": str(config.page_size),
            "num_gpu_blocks": str(num_pages),  # wherever the engine runs
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.kv_cache_free_gpu_memory_fraction),
        }
        help = "How the KV cache was set up."
        metric = GaugeMetricFamily(PREFIX + "cache_config_info", help, labels=list(labels))
        metric.add_metric(list(labels.values()), 1)
        return metric

    def _scalar(self, name: str, family: Family, values: Mapping[str, float]) -> Metric:
        labels = ["model_name"] if family.label is None else ["model_name", family.label]
        kind = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
        metric = kind(PREFIX + name, family.help, labels=labels)
        for label, value in values.items():
            metric.add_metric([self._model_name, label][: len(labels)], value)
        return metric

    def _values(self, stats: EngineStats) -> dict[str, Mapping[str, float]]:
        """Values of gauges and counters by label; the label is of no meaning for most."""
        engine, drafts = self._engine, stats.speculation or SpeculationStats()
        single = {
            "engine_healthy": float(engine.unhealthy is None and engine.closed is None),
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": stats.kv_cache_usage,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "num_preemptions": stats.num_preemptions,
            "spec_decode_num_drafts": drafts.num_drafts,
            "spec_decode_num_draft_tokens": drafts.num_draft_tokens,
            "spec_decode_num_accepted_tokens": drafts.num_accepted_tokens,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
        }
        return {
            **{name: {"": value} for name, value in single.items()},
            "request_success": dict(self.finished),
            "spec_decode_num_accepted_tokens_per_pos": {
                str(place): count for place, count in enumerate(drafts.accepted_per_position or [0])
            },
            "num_requests_waiting_by_reason": {
                "capacity": stats.num_waiting - stats.num_deferred,
                "deferred": stats.num_deferred,
            },
        }


class RequestWatch:
    """Turns the outputs of one request, of kind ``delta`` or ``final``, into observations."""

    __slots__ = ("_counts", "_ended", "_last", "_max_tokens", "_metrics")

    def __init__(self, metrics: Tally, max_tokens: int | None) -> None:
        self._metrics = metrics
        self._max_tokens = max_tokens
        self._last: dict[int, float] = {}  # when a completion had its last token, by its index
        self._counts: Counter[int] = Counter()  # tokens so far, likewise
        self._ended: set[int] = set()

    def see(self, output: RequestOutput) -> None:
        """Take an output into account."""
        times = output.metrics
        now = times.finished_time or time.monotonic()
        if not self._last and times.first_token_time is not None:
            self._metrics.prompt_tokens += len(output.prompt_token_ids)
            self._metrics.observe("request_prompt_tokens", len(output.prompt_token_ids))
            self._metrics.observe("request_params_n", len(output.outputs))
            if self._max_tokens is not None:
                self._metrics.observe("request_params_max_tokens", self._max_tokens)
            self._observe("time_to_first_token_seconds", times, "arrival_time", "first_token_time")
        for completion in output.outputs:
            if completion.index not in self._ended:
                self._see_completion(completion, times, now)
        if output.finished:
            for name, span in _SPANS.items():
                self._observe(name, times, *span)

    def close(self, reason: Literal["abort", "error"]) -> None:
        """Count a request that ended without a last output."""
        if not self._ended:
            self._metrics.finished[reason] += 1

    def _see_completion(
        self, completion: CompletionOutput, times: RequestMetrics, now: float
    ) -> None:
        count, metrics = len(completion.token_ids), self._metrics
        self._counts[completion.index] += count
        if count and times.first_token_time is not None:
            metrics.generation_tokens += count
            last = self._last.get(completion.index)
            if last is None:  # the first token's time is known, and it follows no other
                last, count = times.first_token_time, count - 1
            if count:
                metrics.observe("inter_token_latency_seconds", (now - last) / count, count)
                last = now
            self._last[completion.index] = last
        if completion.finish_reason is not None:
            self._ended.add(completion.index)
            metrics.finished[completion.finish_reason] += 1
            metrics.observe("request_generation_tokens", self._counts[completion.index])

    def _observe(self, name: str, times: RequestMetrics, begin: str, end: str) -> None:
        start, stop = getattr(times, begin), getattr(times, end)
        if start is not None and stop is not None:
            self._metrics.observe(name, stop - start)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a server has counted: its engine in the process ``pid``, and every process that answers
    requests."""

    engine: EngineState
    tallies: Sequence[tuple[Tally, HttpTally]]
    pid: int

    def text(self, model_name: str) -> bytes:
        """All of it in Prometheus' text format."""
        metrics = EngineMetrics(model_name, self.engine)
        for tally, _ in self.tallies:
            metrics.add(tally)
        requests = HttpMetrics(model_name, PREFIX, *(answers for _, answers in self.tallies))
        pickers = PickerMetrics(metrics, PREFIX)
        offload = OffloadMetrics(model_name, self.engine, PREFIX)
        return render(registry_of(metrics, offload, pickers, requests, pid=self.pid))


def registry_of(*collectors: Collector, pid: int | None = None) -> CollectorRegistry:
    """A registry of its own for one server, with the metrics of a process (None: of this one)."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    ProcessCollector(pid=lambda: "self" if pid is None else pid, registry=registry)
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """The Prometheus text format, version 0.0.4."""
    return generate_latest(registry)
