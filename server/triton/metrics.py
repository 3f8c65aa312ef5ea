"""The metrics of ``slipstream serve``, under the same names, as custom metrics of Triton."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client.core import Metric

from slipstream.server.core.metrics import FAMILIES, OLDER, PREFIX, Engine, EngineMetrics

_LOG = logging.getLogger(__name__)
_KINDS: Mapping[str, int] = {
    "gauge": pb_utils.MetricFamily.GAUGE,
    "counter": pb_utils.MetricFamily.COUNTER,
    "histogram": pb_utils.MetricFamily.HISTOGRAM,
}


class TritonMetrics(EngineMetrics):
    """Counts as ``slipstream serve`` does and tells Triton what has changed.

    Instances of a model are told apart by the label ``engine``, versions by ``version``.
    """

    def __init__(self, args: Mapping[str, str], engine: Engine) -> None:
        """``args`` are those of ``initialize``; ``TritonModelException`` if metrics are off."""
        super().__init__(args["model_name"], engine)
        self._labels = {
            "model_name": args["model_name"],
            "version": args["model_version"],
            "engine": args["model_instance_name"].rpartition("_")[2],
        }
        # Values for histograms until they are published: their buckets are Triton's to count.
        self._observed: deque[tuple[str, float]] = deque()
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._told: dict[tuple[str, ...], float] = {}
        self._published = {
            name: self._family(PREFIX + name, family.kind, family.help).Metric(
                labels=self._labels, buckets=list(map(float, family.buckets))
            )
            for name, family in FAMILIES.items()
            if family.kind == "histogram"
        }
        self.publish()

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Add a value to a histogram, here and at the next ``publish`` in Triton's."""
        super().observe(name, value, times)
        self._observed.extend([(name, value)] * times)

    def publish(self) -> None:
        """Tell what has changed since the last time."""
        # What the engine counts step by step has no single values that Triton could be told.
        for metric in self.collect():
            if metric.type in ("gauge", "counter"):
                self._publish_values(metric)
        for _ in range(len(self._observed)):
            name, value = self._observed.popleft()
            for each in (name, *[old for old, new in OLDER.items() if new == name]):
                self._published[each].observe(value)

    def close(self) -> None:
        """Take the metrics out of Triton, which keeps those of a process that has ended."""
        self._metrics.clear()
        self._published.clear()
        self._families.clear()

    def _publish_values(self, metric: Metric) -> None:
        for sample in metric.samples:
            key = (sample.name, *sample.labels.values())
            if key not in self._metrics:
                family = self._family(sample.name, metric.type, metric.documentation)
                self._metrics[key] = family.Metric(labels={**self._labels, **sample.labels})
            told = self._told.get(key)
            # Triton keeps what a process that has died last told it: a gauge is set in any case.
            if metric.type == "gauge" and sample.value != told:
                self._metrics[key].set(sample.value)
            elif metric.type == "counter" and sample.value > (told or 0.0):
                self._metrics[key].increment(sample.value - (told or 0.0))
            self._told[key] = sample.value

    def _family(self, name: str, kind: str, help: str) -> Any:  # noqa: ANN401 - Triton's
        """A family; Triton forgets one that nobody holds."""
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(
                name=name, description=help, kind=_KINDS[kind]
            )
        return self._families[name]


class _Unpublished(EngineMetrics):
    """Counts for nobody, where Triton was started without metrics."""

    def publish(self) -> None:
        pass

    def close(self) -> None:
        pass


def create_metrics(args: Mapping[str, str], engine: Engine) -> TritonMetrics | _Unpublished:
    """Metrics for a model instance; ``args`` are those of ``initialize``."""
    try:
        return TritonMetrics(args, engine)
    except pb_utils.TritonModelException as error:
        _LOG.info("no metrics are exported: %s", error)
        return _Unpublished(args["model_name"], engine)
