"""What is told of prompts that were handed over between workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from slipstream.runtime.handover.stats import HandoverStats


class HandoverMetrics(Collector):
    """The counters of a worker for prompts or for what comes after them."""

    def __init__(self, model_name: str, stats: HandoverStats, prefix: str) -> None:
        """``prefix`` is that of all names."""
        self._model_name, self._stats, self._prefix = model_name, stats, prefix

    def collect(self) -> Iterator[Metric]:
        """Counters in the form of prometheus-client."""
        stats = self._stats
        ways = {"sent": stats.sent, "received": stats.received}
        yield self._counter(
            "kv_transfers",
            "Prompts whose pages were handed to other workers, or taken from them.",
            "direction",
            {name: way.prompts for name, way in ways.items()},
        )
        yield self._counter(
            "kv_transfer_bytes",
            "Bytes of these pages.",
            "direction",
            {name: way.num_bytes for name, way in ways.items()},
        )
        yield self._counter(
            "kv_transfer_seconds",
            "Seconds of copying them to files and from there.",
            "direction",
            {name: way.seconds for name, way in ways.items()},
        )
        yield self._counter(
            "kv_transfers_unsent",
            "Prompts whose pages could not be offered, by the reason.",
            "reason",
            stats.unsent,
        )
        yield self._counter(
            "kv_transfers_lost",
            "Prompts computed by the worker that goes on with them, by the reason.",
            "reason",
            stats.lost,
        )
        yield self._counter(
            "kv_transfers_expired",
            "Offers of pages that were freed because nobody took them.",
            None,
            {"": stats.expired},
        )

    def _counter(
        self, name: str, help: str, label: str | None, values: Mapping[str, float]
    ) -> Metric:
        labels = ["model_name"] if label is None else ["model_name", label]
        metric = CounterMetricFamily(self._prefix + name, help, labels=labels)
        for value, number in values.items():
            metric.add_metric([self._model_name, value][: len(labels)], number)
        return metric
