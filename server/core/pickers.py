"""What pickers of replicas read, under the names that vLLM gives it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# The pickers of llm-d and of the Gateway API take a server that says nothing else of itself for
# vLLM's. Of adapters they hear nothing, as from a vLLM that serves none.
PREFIX = "vllm:"
READ = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info")


class PickerMetrics(Collector):
    """Some gauges of a collector once more."""

    def __init__(self, metrics: Collector, prefix: str) -> None:
        """``prefix`` is what their names begin with there."""
        self._metrics = metrics
        self._names = {prefix + name: PREFIX + name for name in READ}

    def collect(self) -> Iterator[Metric]:
        """The families in the form of prometheus-client."""
        for metric in self._metrics.collect():
            if (name := self._names.get(metric.name)) is not None:
                told = Metric(name, metric.documentation, metric.type)
                told.samples = [sample._replace(name=name) for sample in metric.samples]
                yield told
