from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.histogram import Histogram
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine.step_stats import STEP_SECONDS, STEP_TOKENS
from slipstream.runtime.request import CompletionOutput, RequestMetrics, RequestOutput
from slipstream.server.core.http_metrics import HttpMetrics, HttpTally
from slipstream.server.core.metrics import (
    FAMILIES,
    PREFIX,
    STEPS,
    EngineMetrics,
    registry_of,
    render,
)

CONFIG = RuntimeConfig()
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_cache_usage=0.25,
    prefix_cache_queries=100,
    prefix_cache_hits=40,
    num_preemptions=1,
    num_deferred=1,
    num_pages=24,
    step_tokens=Histogram(STEP_TOKENS),
    step_seconds=Histogram(STEP_SECONDS),
)


@dataclass
class Engine:
    """What metrics read of an engine."""

    stats: EngineStats = STATS
    config: RuntimeConfig = CONFIG
    unhealthy: str | None = None
    closed: str | None = None


ENGINE = Engine()
# vLLM's names of what dashboards show, without its prefix.
VLLM = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
    "cache_config_info",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
}
OWN = {"engine_healthy", "step_time_seconds"}


def scrape(metrics: EngineMetrics) -> dict[str, float]:
    text = render(registry_of(metrics)).decode()
    return {
        " ".join([sample.name, *(v for k, v in sample.labels.items() if k != "model_name")]): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("slipstream:")
    }


def output(
    times: RequestMetrics, tokens: int, reason: str | None = None, *, index: int = 0
) -> RequestOutput:
    completion = CompletionOutput(index, "", [1] * tokens, finish_reason=reason)  # type: ignore[arg-type]
    return RequestOutput("x", None, [1, 2, 3], [completion], reason is not None, times)


def test_the_families_are_vllms() -> None:
    assert {*FAMILIES, *STEPS, "cache_config_info"} == VLLM | OWN
    families = {f.name: f for f in EngineMetrics("m", ENGINE).collect()}
    assert set(families) == {f"slipstream:{name}" for name in VLLM | OWN}
    for name, family in {**FAMILIES, **STEPS}.items():
        assert families[f"slipstream:{name}"].type == family.kind
        assert families[f"slipstream:{name}"].samples[0].labels["model_name"] == "m"


def test_gauges_are_what_the_scheduler_says_now() -> None:
    samples = scrape(EngineMetrics("m", ENGINE))
    assert samples["slipstream:num_requests_running"] == 3
    assert samples["slipstream:num_requests_waiting"] == 2
    assert samples["slipstream:kv_cache_usage_perc"] == 0.25
    assert samples["slipstream:prefix_cache_hits_total"] == 40
    assert samples["slipstream:num_requests_waiting_by_reason capacity"] == 1
    assert samples["slipstream:num_requests_waiting_by_reason deferred"] == 1


def test_the_size_of_the_cache_is_told_in_labels() -> None:
    families = {f.name: f for f in EngineMetrics("m", ENGINE).collect()}
    (info,) = families["slipstream:cache_config_info"].samples
    assert info.value == 1
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("32", "24")
    assert info.labels["enable_prefix_caching"] == "True"


def test_steps_are_those_of_the_engine() -> None:
    stats = replace(STATS, step_tokens=Histogram((1, 8)), step_seconds=Histogram((0.5,)))
    for tokens in (1, 5, 20):
        stats.step_tokens.observe(tokens)
    stats.step_seconds.observe(0.25, 3)
    samples = scrape(EngineMetrics("m", Engine(stats)))
    assert samples["slipstream:iteration_tokens_total_sum"] == 26
    assert samples["slipstream:iteration_tokens_total_bucket 8.0"] == 2
    assert samples["slipstream:step_time_seconds_count"] == 3


def test_answers_are_counted_and_what_clients_make_up_is_not_told() -> None:
    answers = HttpTally()
    requests = HttpMetrics("m", PREFIX, answers)
    answers.count("GET", "/health", 200)
    answers.count("GET", "/health", 200)
    answers.count("BREW", None, 405)
    (family,) = requests.collect()
    assert {tuple(s.labels.values()): s.value for s in family.samples} == {
        ("m", "GET", "200", "/health"): 2,
        ("m", "other", "405", "none"): 1,
    }


def test_an_engine_that_is_unhealthy_or_closed_is_told() -> None:
    engine = Engine()
    metrics = EngineMetrics("m", engine)
    assert scrape(metrics)["slipstream:engine_healthy"] == 1
    engine.unhealthy = "the device hangs"
    assert scrape(metrics)["slipstream:engine_healthy"] == 0
    engine.unhealthy, engine.closed = None, "shut down"
    assert scrape(metrics)["slipstream:engine_healthy"] == 0


def test_a_request_in_one_piece() -> None:
    metrics = EngineMetrics("m", ENGINE)
    metrics.watch().see(output(RequestMetrics(10, 11, 13, 17), 5, "stop"))
    samples = scrape(metrics)
    assert samples["slipstream:prompt_tokens_total"] == 3
    assert samples["slipstream:generation_tokens_total"] == 5
    assert samples["slipstream:request_success_total stop"] == 1
    sums = {
        "time_to_first_token": 3,
        "inter_token_latency": 4,
        "time_per_output_token": 4,
        "e2e_request_latency": 7,
        "request_queue_time": 1,
        "request_prefill_time": 2,
        "request_decode_time": 4,
        "request_inference_time": 6,
    }
    for name, total in sums.items():
        assert samples[f"slipstream:{name}_seconds_sum"] == total, name
    assert samples["slipstream:inter_token_latency_seconds_count"] == 4
    assert samples["slipstream:inter_token_latency_seconds_bucket 1.0"] == 4
    assert samples["slipstream:inter_token_latency_seconds_bucket 0.75"] == 0


def test_a_stream_counts_the_same_and_measures_every_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = EngineMetrics("m", ENGINE)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    times = RequestMetrics(now - 3, now - 2, now - 1)
    watch = metrics.watch()
    for tokens in (1, 1, 2):
        watch.see(output(times, tokens))
    times.finished_time = now
    watch.see(output(times, 1, "length"))
    samples = scrape(metrics)
    assert samples["slipstream:generation_tokens_total"] == 5
    assert samples["slipstream:prompt_tokens_total"] == 3
    assert samples["slipstream:inter_token_latency_seconds_count"] == 4
    assert samples["slipstream:inter_token_latency_seconds_sum"] == 1
    assert samples["slipstream:time_to_first_token_seconds_count"] == 1
    assert samples["slipstream:request_success_total length"] == 1


def test_a_completion_that_ended_is_counted_once() -> None:
    metrics = EngineMetrics("m", ENGINE)
    watch, times = metrics.watch(), RequestMetrics(1, 2, 3, 4)
    first = output(times, 2, "stop")
    first.finished = False
    second = output(times, 3, "length", index=1)
    second.outputs.insert(0, CompletionOutput(0, "", [], finish_reason="stop"))
    watch.see(first)
    watch.see(second)
    assert metrics.finished == {"stop": 1, "length": 1, "abort": 0, "error": 0}
    assert metrics.generation_tokens == 5


def test_sizes_of_requests_are_those_that_vllms_clients_look_for() -> None:
    metrics = EngineMetrics("m", ENGINE)
    metrics.watch(max_tokens=9).see(output(RequestMetrics(10, 11, 13, 17), 5, "stop"))
    watch, times = metrics.watch(), RequestMetrics(10, 11, 13)
    for reason in (None, "length"):  # a stream of two completions
        step = output(times, 3, reason)
        step.outputs.append(
            CompletionOutput(1, "", [1] * 4, finish_reason=step.outputs[0].finish_reason)
        )
        watch.see(step)
    samples = scrape(metrics)
    for name, count, total in (
        ("request_prompt_tokens", 2, 6),
        ("request_generation_tokens", 3, 5 + 6 + 8),
        ("request_params_n", 2, 3),
        ("request_params_max_tokens", 1, 9),  # the other was not bounded
        ("time_per_output_token_seconds", 4 + 5 + 7, None),
    ):
        assert samples[f"slipstream:{name}_count"] == count, name
        assert total in (None, samples[f"slipstream:{name}_sum"]), name


def test_a_request_that_was_dropped() -> None:
    metrics = EngineMetrics("m", ENGINE)
    metrics.watch().close("abort")
    assert metrics.finished["abort"] == 1 and metrics.prompt_tokens == 0


def test_a_value_on_a_bound_is_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert (histogram.count, histogram.sum) == (5, 14.0)


def test_two_servers_share_nothing() -> None:
    one, other = EngineMetrics("a", ENGINE), EngineMetrics("b", ENGINE)
    one.watch().see(output(RequestMetrics(1, 2, 3, 4), 2, "stop"))
    assert scrape(one)["slipstream:generation_tokens_total"] == 2
    assert scrape(other)["slipstream:generation_tokens_total"] == 0
