"""What Triton is told of metrics, with a stand-in for the module that tells it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.histogram import Histogram
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine.step_stats import STEP_SECONDS, STEP_TOKENS
from slipstream.runtime.request import CompletionOutput, RequestMetrics, RequestOutput

CONFIG = RuntimeConfig()
BUSY = EngineStats(
    num_running=1,
    num_waiting=2,
    kv_cache_usage=0.5,
    prefix_cache_queries=7,
    prefix_cache_hits=3,
    num_preemptions=0,
    num_deferred=0,
    num_pages=24,
    step_tokens=Histogram(STEP_TOKENS),
    step_seconds=Histogram(STEP_SECONDS),
)
IDLE = replace(BUSY, num_running=0, num_waiting=0, kv_cache_usage=0.0, prefix_cache_queries=0)
ARGS = {"model_name": "m", "model_version": "1", "model_instance_name": "m_0_0"}


@dataclass
class Engine:
    """What metrics read of an engine."""

    stats: EngineStats = BUSY
    config: RuntimeConfig = CONFIG
    unhealthy: str | None = None
    closed: str | None = None


class Triton:
    """The values that Triton keeps, by name; they outlive the processes that tell them."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.module = ModuleType("triton_python_backend_utils")
        self.module.MetricFamily = self._family()  # type: ignore[attr-defined]
        self.module.TritonModelException = RuntimeError  # type: ignore[attr-defined]

    def _family(self) -> type:
        values = self.values

        class Metric:
            def __init__(self, name: str, labels: dict[str, str]) -> None:
                own = [labels[key] for key in ("finished_reason", "reason") if key in labels]
                self.name = " ".join([name, *own])
                values.setdefault(self.name, 0.0)

            def set(self, value: float) -> None:
                values[self.name] = value

            def increment(self, value: float) -> None:
                assert value > 0
                values[self.name] += value

            def observe(self, _: float) -> None:
                values[self.name] += 1

        class MetricFamily:
            GAUGE, COUNTER, HISTOGRAM = range(3)

            def __init__(self, name: str, description: str, kind: int) -> None:
                self.name = name.removeprefix("slipstream:")

            def Metric(self, labels: dict[str, str], buckets: Any = None) -> Metric:  # noqa: ANN401
                return Metric(self.name, labels)

        return MetricFamily


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Triton]:
    """Triton, for a module that is imported afresh."""
    triton, name = Triton(), "slipstream.server.triton.metrics"
    monkeypatch.setitem(sys.modules, triton.module.__name__, triton.module)
    sys.modules.pop(name, None)
    yield triton
    sys.modules.pop(name, None)


def start(engine: Engine) -> Any:  # noqa: ANN401 - TritonMetrics, which needs Triton's module
    """The metrics of a process that has just begun."""
    return importlib.import_module("slipstream.server.triton.metrics").TritonMetrics(ARGS, engine)


def test_gauges_are_set_by_the_first_publication_after_a_crash(triton: Triton) -> None:
    start(Engine())  # and then the process dies
    assert triton.values["num_requests_running"] == 1
    assert triton.values["num_requests_waiting_by_reason capacity"] == 2
    assert triton.values["cache_config_info"] == 1
    start(Engine(IDLE))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert triton.values[name] == 0, name
    assert triton.values["engine_healthy"] == 1


def test_counters_go_on_after_a_crash(triton: Triton) -> None:
    start(Engine())
    metrics = start(Engine())
    assert triton.values["prefix_cache_queries_total"] == 14
    metrics.publish()
    assert triton.values["prefix_cache_queries_total"] == 14


def test_a_request_is_told_with_the_next_publication(triton: Triton) -> None:
    metrics = start(Engine())
    completion = CompletionOutput(0, "", [1] * 5, finish_reason="stop")
    times = RequestMetrics(1, 2, 3, 4)
    metrics.watch().see(RequestOutput("x", None, [1, 2], [completion], True, times))
    assert triton.values["request_params_n"] == 0
    metrics.publish()
    for name in ("request_params_n", "request_prompt_tokens", "request_generation_tokens"):
        assert triton.values[name] == 1, name
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert triton.values[name] == 4, name
    assert triton.values["request_success_total stop"] == 1
