"""``slipstream eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import bytes_per_token, page_size_of
from slipstream.builder.engine import is_engine, open_engine
from slipstream.errors import MissingDependencyError
from slipstream.quantize.calibration_data import EVALUATION_WINDOW, evaluation_windows
from slipstream.quantize.evaluate import Accuracy, Perplexity, accuracy, perplexity
from slipstream.runtime.speculation.config import spelled_out
from slipstream.runtime.speculation.proposer import OFF
from slipstream.server.acceptance import measure_acceptance
from slipstream.server.command import Command
from slipstream.server.models import engine_path
from slipstream.server.options import unwatched_options
from slipstream.server.progress import Report, item_progress
from slipstream.server.text import format_columns

if TYPE_CHECKING:
    from slipstream.runtime.loaded_engine import LoadedEngine
    from slipstream.runtime.text.tokenizer import Tokenizer

Tokens = NDArray[np.int32]
Blocks = Iterable[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured on what; ``accuracy`` only against a reference."""

    engine: Path
    reference: str | None
    text: Path | None
    windows: Sequence[Tokens] = field(repr=False)
    perplexity: Perplexity
    accuracy: Accuracy | None
    seconds: float


@click.command("eval", cls=Command)
@click.argument("engine")
@click.option(
    "--reference",
    metavar="CHECKPOINT",
    help="Compare with this checkpoint in float32, or with another engine.  [default: none]",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A .txt or .jsonl file to predict.  [default: a text that comes with Slipstream]",
)
@click.option(
    "--window",
    type=click.IntRange(min=16),
    help="Tokens predicted in one context.  "
    f"[default: {EVALUATION_WINDOW}, or max-seq-len if that is less]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@unwatched_options
def evaluate(
    engine: str,
    reference: str | None,
    text: Path | None,
    window: int | None,
    as_json: bool,
    runtime: dict[str, Any],
) -> None:
    """Measure what an engine predicts: perplexity, and how far it is from a reference.

    The engine itself computes every prediction, with its own kernels and KV cache. Against a
    reference, the KL divergence (in nats) tells more than the perplexity, and errors are paired:
    both models see the same tokens. A checkpoint as the reference needs torch.

    With --speculative it continues the text instead, 64 tokens after each window of 128, and tells
    how many guesses (--num-speculative-tokens, 4) were right, by their position.

    \b
    Examples:
      slipstream eval engine
      slipstream eval engine --reference Qwen/Qwen3-0.6B --json | jq .accuracy.kl_mean
      slipstream eval engine-int4 --reference engine-bf16 --text report.txt
      slipstream eval engine --speculative eagle3 --num-speculative-tokens 5
    """
    options = {name: value for name, value in spelled_out(runtime).items() if value is not None}
    if options.get("speculative", OFF) != OFF:
        if reference is not None:
            raise click.UsageError("--speculative has no reference; leave one of the two out")
        found = measure_acceptance(engine_path(engine, options), text, window, options)
        rows = [("engine", engine), *found.describe()]
        told = json.dumps({"engine": engine, **found.as_dict()}, indent=2)
        click.echo(told if as_json else format_columns(rows, indent=""))
        return
    measured = _measure(engine, reference, text, window, runtime)
    click.echo(json.dumps(_as_json(measured), indent=2) if as_json else _as_text(measured))


def _measure(
    engine: str,
    reference: str | None,
    text: Path | None,
    window: int | None,
    runtime: dict[str, Any],
) -> _Measured:
    start = time.perf_counter()
    path = engine_path(engine, runtime)
    limit = runtime.get("max_seq_len", open_engine(path).manifest.limits.max_seq_len)
    window = window or min(EVALUATION_WINDOW, limit)
    loaded = _load(path, window, runtime)
    try:
        windows = _windows(loaded.tokenizer, text, window)
        with item_progress("predicting") as report:
            found, compared = _compare(loaded, reference, windows, runtime, report)
    finally:
        loaded.executor.shutdown()
    seconds = time.perf_counter() - start
    return _Measured(path, reference, text, windows, found, compared, seconds)


def _compare(
    engine: LoadedEngine,
    reference: str | None,
    windows: Sequence[Tokens],
    runtime: dict[str, Any],
    report: Report,
) -> tuple[Perplexity, Accuracy | None]:
    # Imported here, with the device's libraries behind it, so that bad usage is reported at once.
    from slipstream.runtime.scoring import window_logits

    ours = _counted(window_logits(engine, windows), windows, report)
    if reference is None:
        return perplexity(ours, windows), None
    if not is_engine(Path(reference)):
        compared = accuracy(_checkpoint_logits(reference, windows), ours, windows)
        return compared.candidate, compared
    other = _load(Path(reference), max(map(len, windows)), runtime)
    try:
        compared = accuracy(window_logits(other, windows), ours, windows)
    finally:
        other.executor.shutdown()
    return compared.candidate, compared


def _load(path: Path, window: int, runtime: dict[str, Any]) -> LoadedEngine:
    """An engine with room for one window, unless memory is asked for."""
    from slipstream.runtime.loading import load

    caches = open_engine(path).manifest.caches
    size = page_size_of(caches)
    tokens = -(-window // size) * size
    return load(path, {"kv_cache_bytes": tokens * bytes_per_token(caches), **runtime})


def _windows(tokenizer: Tokenizer, text: Path | None, window: int) -> list[Tokens]:
    def template(messages: Sequence[Any]) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=False)

    conversation = template if tokenizer.has_chat_template else None
    return evaluation_windows(tokenizer.encode, text, window, conversation)


def _checkpoint_logits(reference: str, windows: Sequence[Tokens]) -> Blocks:
    from slipstream.builder.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(reference)  # a wrong path is told before torch is loaded
    try:
        from slipstream.quantize.forward import CheckpointModel
    except ImportError as error:
        raise MissingDependencyError(
            f"a checkpoint as the reference needs {error.name}, which is not installed; install "
            "it: pip install 'slipstream[quantize]', or give an engine as the reference"
        ) from error
    return CheckpointModel(checkpoint).logits(windows)


def _counted(blocks: Blocks, windows: Sequence[Tokens], report: Report) -> Iterator[Any]:
    """The same blocks, while tokens are counted."""
    done, total = 0, sum(map(len, windows))
    for block in blocks:
        yield block
        done += len(block)
        report(done, total)


def _as_json(measured: _Measured) -> dict[str, object]:
    return {
        "engine": str(measured.engine),
        "reference": measured.reference,
        "text": None if measured.text is None else str(measured.text),
        "windows": len(measured.windows),
        "window": max(map(len, measured.windows)),
        **measured.perplexity.as_dict(),
        "accuracy": None if measured.accuracy is None else measured.accuracy.as_dict(),
        "seconds": measured.seconds,
    }


def _as_text(measured: _Measured) -> str:
    windows, found = measured.windows, measured.perplexity
    text = "the one that comes with Slipstream" if measured.text is None else measured.text
    shape = f"{len(windows)} of up to {max(map(len, windows))} tokens"
    rows = [
        ("engine", str(measured.engine)),
        ("text", f"{text}: {found.tokens} tokens predicted, windows: {shape}"),
        ("perplexity", str(found)),
    ]
    if measured.accuracy is not None:
        rows += _comparison(str(measured.reference), measured.accuracy)
    rows.append(("time", f"{measured.seconds:.1f} s"))
    return format_columns(rows, indent="")


def _comparison(reference: str, found: Accuracy) -> list[tuple[str, str]]:
    divergence = f"{found.kl_mean:.4g} ± {found.kl_standard_error:.2g} nats"
    return [
        ("reference", f"{reference}: perplexity {found.reference}"),
        ("change", f"{found.change} (paired)"),
        ("KL divergence", f"{divergence}, 99th percentile {found.kl_p99:.3g}"),
        ("same top token", f"{found.top1:.2%}"),
    ]
