"""What a server answered over HTTP, with vLLM's metric names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})


class HttpTally:
    """The answers of one process."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def count(self, method: str, path: str | None, status: int) -> None:
        """Count an answer by its method, the path of its route (None: it has none) and its status.

        What a client makes up is not told, lest there be a series for each.
        """
        known = method if method in _METHODS else "other"
        self.counts[known, str(status), path or "none"] += 1

    def add(self, other: HttpTally) -> None:
        """Count what another has counted, too."""
        self.counts.update(other.counts)


class HttpMetrics(Collector):
    """The answers of a server, as one or several processes have counted them."""

    def __init__(self, model_name: str, prefix: str, *tallies: HttpTally) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._tallies = tallies

    def collect(self) -> Iterator[Metric]:
        """One family, in the form of prometheus-client."""
        labels = ["model_name", "method", "status", "handler"]
        metric = CounterMetricFamily(self._prefix + "http_requests", "HTTP answers.", labels=labels)
        total: Counter[tuple[str, str, str]] = Counter()
        for tally in self._tallies:
            total.update(tally.counts.copy())
        for key, value in total.items():
            metric.add_metric([self._model_name, *key], value)
        yield metric
