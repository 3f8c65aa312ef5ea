"""``slipstream bench throughput``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipstream.server.bench.options import POSITIVE, bench_options
from slipstream.server.command import Command
from slipstream.server.models import engine_path
from slipstream.server.options import unwatched_options
from slipstream.server.progress import item_progress

if TYPE_CHECKING:
    from slipstream.server.bench.measure import Bench, Measurement


@click.command(cls=Command)
@click.argument("model")
@bench_options
@click.option("--num-prompts", type=POSITIVE, default=64, help="Requests in all.")
@click.option(
    "--max-concurrency",
    type=POSITIVE,
    help="Requests in flight; a new one is sent when one ends.  "
    "[default: the engine's max-batch-size]",
)
@unwatched_options
def throughput(
    model: str,
    input_len: int,
    output_len: int,
    seed: int,
    json_file: Path | None,
    num_prompts: int,
    max_concurrency: int | None,
    runtime: dict[str, Any],
) -> None:
    """Measure many requests in flight: tokens per second, and what each request saw of it.

    Prompts are random tokens; answers are greedy and of full length. One request runs before the
    measurement, and what a server prepares while nobody asks is prepared.

    \b
    Example:
      slipstream bench throughput engine --num-prompts 128 --max-concurrency 16
    """
    engine = engine_path(model, runtime)
    # Imported here, with onnxruntime behind them, so that bad usage is reported at once.
    from slipstream.runtime.loading import load
    from slipstream.server.bench.measure import Bench, Workload
    from slipstream.server.bench.report import Report

    loaded = load(engine, runtime)
    concurrency = max_concurrency or loaded.config.max_batch_size
    with Bench(loaded, Workload(input_len, output_len, seed)) as bench:
        measured = _measure(bench, num_prompts, concurrency)
    report = Report(
        benchmark="throughput",
        engine=engine,
        batch=concurrency,
        settings={
            "input_len": input_len,
            "output_len": output_len,
            "seed": seed,
            "num_prompts": num_prompts,
            "max_concurrency": concurrency,
        },
        timings=_timings(measured),
        rates=_rates(measured, input_len),
    )
    report.publish(json_file)


def _measure(bench: Bench, num_prompts: int, concurrency: int) -> Measurement:
    bench.measure(1, 1)
    bench.prepare()
    with item_progress("requests") as progress:
        return bench.measure(num_prompts, concurrency, lambda done: progress(done, num_prompts))


def _timings(measured: Measurement) -> dict[str, list[float]]:
    return {
        "time_to_first_token": [trace.first for trace in measured.traces],
        "between_tokens": [gap for trace in measured.traces for gap in trace.gaps],
        "outside_executor": measured.waits,
    }


def _rates(measured: Measurement, input_len: int) -> dict[str, float]:
    count = len(measured.traces)
    prompt, output = count * input_len, sum(len(trace.tokens) for trace in measured.traces)
    return {
        "requests_per_second": count / measured.seconds,
        "output_tokens_per_second": output / measured.seconds,
        "total_tokens_per_second": (prompt + output) / measured.seconds,
        "tokens_per_step": (prompt + output) / measured.steps,
        "preemptions": measured.preemptions,
    }
