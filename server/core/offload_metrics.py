"""What is told of pages that go to the host and come back, in vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from slipstream.runtime.config import RuntimeConfig
    from slipstream.runtime.engine.stats import EngineStats


class Engine(Protocol):
    """Whose counters are read."""

    @property
    def stats(self) -> EngineStats:
        """What the engine has done."""
        ...

    @property
    def config(self) -> RuntimeConfig:
        """How it was set up."""
        ...


class OffloadMetrics(Collector):
    """The counters of an engine that keeps pages on the host; nothing for another."""

    def __init__(self, model_name: str, engine: Engine, prefix: str) -> None:
        """``prefix`` is that of all names."""
        self._model_name, self._engine, self._prefix = model_name, engine, prefix

    def collect(self) -> Iterator[Metric]:
        """Counters in the form of prometheus-client."""
        if not self._engine.config.kv_offload_gib:
            return
        stats = self._engine.stats
        yield self._counter(
            "external_prefix_cache_queries",
            "Prompt tokens that the prefix cache had not, looked up on the host.",
            {"": stats.host_queries},
        )
        yield self._counter(
            "external_prefix_cache_hits",
            "Prompt tokens brought back from the host.",
            {"": stats.host_hits},
        )
        # The device is a GPU in vLLM's names, whatever it is.
        ways = {"GPU_to_CPU": stats.stored, "CPU_to_GPU": stats.loaded}
        yield self._counter(
            "kv_offload_total_bytes",
            "Bytes of pages copied between device and host.",
            {way: traffic.num_bytes for way, traffic in ways.items()},
        )
        yield self._counter(
            "kv_offload_total_time",
            "Seconds that these copies took.",
            {way: traffic.seconds for way, traffic in ways.items()},
        )

    def _counter(self, name: str, help: str, values: Mapping[str, float]) -> Metric:
        """Values by the way that pages went, or one of no way."""
        labels = ["model_name", "transfer_type"][: 1 + ("" not in values)]
        metric = CounterMetricFamily(self._prefix + name, help, labels=labels)
        for way, value in values.items():
            metric.add_metric([self._model_name, way][: len(labels)], value)
        return metric
