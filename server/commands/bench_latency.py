"""``slipstream bench latency``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipstream.errors import InvalidRequestError
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
@click.option("--batch-size", type=POSITIVE, default=1, help="Requests sent together.")
@click.option("--num-iters", type=POSITIVE, default=5, help="Batches that are measured.")
@click.option(
    "--num-iters-warmup", type=click.IntRange(min=0), default=1, help="Batches before those."
)
@unwatched_options
def latency(
    model: str,
    input_len: int,
    output_len: int,
    seed: int,
    json_file: Path | None,
    runtime: dict[str, Any],
    **counts: int,
) -> None:
    """Measure one batch at a time: time to the first token, between tokens, tokens per second.

    Prompts are random tokens; answers are greedy and of full length. "outside executor" is how long
    the device waits for the engine loop between two steps.

    \b
    Example:
      slipstream bench latency engine --input-len 512 --output-len 128 --json latency.json
    """
    engine = engine_path(model, runtime)
    # Imported here, with onnxruntime behind them, so that bad usage is reported at once.
    from slipstream.runtime.loading import load
    from slipstream.server.bench.measure import Bench, Workload
    from slipstream.server.bench.report import Report

    loaded = load(engine, runtime)
    if counts["batch_size"] > loaded.config.max_batch_size:
        raise InvalidRequestError(
            f"batch-size is {counts['batch_size']}, but the engine's max_batch_size is "
            f"{loaded.config.max_batch_size}; lower it, or build with a larger --max-batch-size"
        )
    workload = Workload(input_len, output_len, seed)
    with Bench(loaded, workload) as bench:
        measured = _measure(bench, **counts)
    report = Report(
        benchmark="latency",
        engine=engine,
        batch=counts["batch_size"],
        settings={"input_len": input_len, "output_len": output_len, "seed": seed, **counts},
        timings=_timings(measured),
        rates={"output_tokens_per_second": _rate(measured)},
    )
    report.publish(json_file)


def _measure(
    bench: Bench, batch_size: int, num_iters: int, num_iters_warmup: int
) -> list[Measurement]:
    total = num_iters_warmup + num_iters
    measured = []
    with item_progress("batches") as progress:
        for done in range(total):
            progress(done, total)
            measured.append(bench.measure(batch_size, batch_size))
    return measured[num_iters_warmup:]


def _timings(measured: list[Measurement]) -> dict[str, list[float]]:
    traces = [trace for measurement in measured for trace in measurement.traces]
    return {
        "time_to_first_token": [trace.first for trace in traces],
        "between_tokens": [gap for trace in traces for gap in trace.gaps],
        "batch": [measurement.seconds for measurement in measured],
        "outside_executor": [wait for measurement in measured for wait in measurement.waits],
    }


def _rate(measured: list[Measurement]) -> float:
    tokens = sum(len(trace.tokens) for m in measured for trace in m.traces)
    return tokens / sum(measurement.seconds for measurement in measured)
