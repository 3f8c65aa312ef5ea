from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slipstream import __version__
from slipstream.server.cli import slipstream

SHORT = ("--input-len", 20, "--output-len", 6)


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["bench", *map(str, arguments)])


def test_latency_reports_times_and_what_it_ran_on(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--batch-size", 3, "--num-iters", 2, "--json", file]
    result = run("latency", tiny_engine, *SHORT, *options)
    assert result.exit_code == 0, result.output
    for words in ("time to first token", "between tokens", "outside executor", "p99"):
        assert words in result.stdout
    report = json.loads(file.read_text())
    assert report["settings"] == {
        "input_len": 20,
        "output_len": 6,
        "seed": 0,
        "batch_size": 3,
        "num_iters": 2,
        "num_iters_warmup": 1,
    }
    times = report["milliseconds"]
    for values in times.values():
        assert 0 < values["p50"] <= values["p90"] <= values["p99"]
    assert times["time_to_first_token"]["p50"] < times["batch"]["p50"]
    # 3 answers of 6 tokens in the time of a batch.
    rate = 3 * 6 / times["batch"]["mean"] * 1000
    assert report["rates"]["output_tokens_per_second"] == pytest.approx(rate)
    assert report["environment"]["slipstream"] == __version__
    assert report["environment"]["cpu"] and report["environment"]["onnxruntime"]
    assert report["engine"]["path"] == str(tiny_engine)
    # All weights but the embedding, whose rows are read.
    weights = report["engine"]["weight_bytes"] - 320 * 64 * 4
    assert 0.99 * weights < report["weights_read_by_a_step"] < weights
    assert "a step of 3 tokens reads " in result.stdout


def test_throughput_counts_every_token(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--num-prompts", 7, "--max-concurrency", 3, "--json", file]
    result = run("throughput", tiny_engine, *SHORT, *options)
    assert result.exit_code == 0, result.output
    rates = json.loads(file.read_text())["rates"]
    requests = rates["requests_per_second"]
    assert rates["output_tokens_per_second"] == pytest.approx(6 * requests)
    assert rates["total_tokens_per_second"] == pytest.approx(26 * requests)
    assert "output tokens per second" in result.stdout


def test_one_token_has_no_time_between_tokens(tiny_engine: Path) -> None:
    result = run("latency", tiny_engine, "--input-len", 4, "--output-len", 1, "--num-iters", 1)
    assert result.exit_code == 0, result.output
    assert "time to first token" in result.stdout and "between tokens" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-len", 500, "--output-len", 100], "more than the engine's max_seq_len of 512"),
        (["--batch-size", 1000], "batch-size is 1000, but the engine's max_batch_size is 64"),
        (["--num-iters", 1, *SHORT, "--json", "/no/such/directory/f"], "cannot be written"),
    ],
)
def test_errors_are_one_line(tiny_engine: Path, arguments: list[Any], message: str) -> None:
    result = run("latency", tiny_engine, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_bad_usage(tiny_engine: Path) -> None:
    result = run("throughput", tiny_engine, "--num-prompts", 0)
    assert result.exit_code == 2 and "--num-prompts" in result.stderr
