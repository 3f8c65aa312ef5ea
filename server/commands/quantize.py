"""``slipstream quantize``."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipstream.cores import usable_cores
from slipstream.server.command import Command
from slipstream.server.options import output_option, quantize_options
from slipstream.server.progress import Report as Bar
from slipstream.server.progress import item_progress
from slipstream.server.text import format_bytes, format_columns, printable

if TYPE_CHECKING:
    from slipstream.builder.checkpoints import Checkpoint
    from slipstream.quantize.options import QuantizeOptions
    from slipstream.quantize.plan import Plan
    from slipstream.quantize.quantize import Text
    from slipstream.quantize.report.record import Report


@click.command(cls=Command)
@click.argument("checkpoint")
@output_option("Directory of the result; an older result that stands there is replaced.")
@quantize_options
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, and what it takes, without reading weights or writing.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the layers that an interrupted run has finished, and keep those of this run "
    "if it fails.",
)
def quantize(
    checkpoint: str, output: Path | None, options: QuantizeOptions, dry_run: bool, resume: bool
) -> None:
    """Quantize a checkpoint, and measure what it costs.

    CHECKPOINT is a Hugging Face directory, a .gguf file or a hub id such as Qwen/Qwen3-0.6B, of
    float32, float16 or bfloat16 weights. The result is a Hugging Face directory for slipstream
    build, vLLM, SGLang or transformers. The report in it compares the files as written with
    CHECKPOINT.

    \b
    Examples:
      slipstream quantize Qwen/Qwen3-0.6B -o qwen-int4
      slipstream quantize Qwen/Qwen3-0.6B -o qwen-5bit --auto-bits 5 --max-ppl-increase 5
      slipstream quantize model -o model-fp8 --qformat fp8 --kv-cache-dtype fp8
      slipstream quantize model --qformat int4_gptq --override 're:.*down_proj=int8_wo' --dry-run
    """
    if dry_run and resume:
        raise click.UsageError("--resume goes on with a run, --dry-run makes none; leave one out")
    if dry_run:
        _dry_run(checkpoint, options)
    elif output is None:
        raise click.UsageError("say where to write the result: -o DIRECTORY (or use --dry-run)")
    else:
        _quantize(checkpoint, output, options, resume)


def _dry_run(source: str, options: QuantizeOptions) -> None:
    from slipstream.builder.checkpoints import open_checkpoint
    from slipstream.quantize.checks import check_plan
    from slipstream.quantize.plan import make_plan

    plan = make_plan(open_checkpoint(source), options)
    check_plan(plan)
    click.echo(format_columns(_needs(plan), indent=""))
    click.echo()
    click.echo(format_columns([("linears", "scheme"), *_counted(plan)], indent=""))
    for note in plan.notes:
        click.echo(f"note: {printable(note)}")


def _needs(plan: Plan) -> list[tuple[str, str]]:
    before, after, bits = plan.source_nbytes, plan.nbytes, plan.effective_bits
    asked = plan.options.auto_bits
    if asked is not None:
        weights = sum(n * k for n, k in map(plan.shape, plan.linears))
        after, bits = after + int((asked - bits) * weights / 8), asked
    minutes = plan.seconds(usable_cores()) / 60
    return [
        ("size", f"{format_bytes(after)} ({after / before:.0%} of {format_bytes(before)})"),
        ("bits", f"{bits:.2f} a weight of the decoder's linears, scales counted"),
        ("memory", f"about {format_bytes(plan.memory)}, besides torch"),
        ("time", f"about {max(minutes, 1):.0f} min here, and as long again to measure the result"),
    ]


def _counted(plan: Plan) -> list[tuple[str, str]]:
    """How many linears of a kind have which scheme and group."""
    schemes, kinds = plan.schemes, Counter[tuple[str, str]]()
    for module in plan.linears:
        scheme = schemes.get(module)
        kinds[module.rpartition(".")[2], "dense" if scheme is None else scheme.describe()] += 1
    return [(f"{count} {kind}", scheme) for (kind, scheme), count in kinds.items()]


def _quantize(source: str, output: Path, options: QuantizeOptions, resume: bool) -> None:
    # Imported here, with the libraries that read weights, so that bad usage is reported at once.
    from slipstream.quantize.quantize import quantize as run

    started = time.monotonic()
    with ExitStack() as stack:
        progress = _Progress(stack)
        report = run(
            source,
            output,
            options,
            lambda checkpoint: _text(checkpoint, source, stack),
            resume=resume,
            progress=progress,
        )
    _summarize(report, output, time.monotonic() - started)


def _text(checkpoint: Checkpoint, source: str, stack: ExitStack) -> Text:
    from slipstream.quantize.quantize import Text
    from slipstream.runtime.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        checkpoint.write_tokenizer(Path(directory))
        tokenizer = Tokenizer.from_directory(directory)

    def template(messages: Sequence[Any]) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=False)

    conversation = template if tokenizer.has_chat_template else None
    return Text(tokenizer.encode, conversation, _sampler(source, stack))


def _sampler(source: str, stack: ExitStack) -> Callable[[Sequence[int], int, int], Sequence[int]]:
    """Lets the model go on with a prompt; it is compiled when that is first asked for."""
    engines: list[Any] = []

    def sample(prompt: Sequence[int], count: int, seed: int) -> Sequence[int]:
        from slipstream.runtime.llm import LLM
        from slipstream.runtime.sampling.params import SamplingParams
        from slipstream.server.models import load_model

        if not engines:
            engines.append(stack.enter_context(LLM.from_engine(load_model(source, {}))))
        params = SamplingParams(max_tokens=count, temperature=1.0, seed=seed, ignore_eos=True)
        (output,) = engines[0].generate([list(prompt)], params)
        tokens: Sequence[int] = output.outputs[0].token_ids
        return tokens

    return sample


class _Progress:
    """A bar for each stage in a terminal; elsewhere a line for each layer, with the time left."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack.enter_context(ExitStack())
        self._stage = ""
        self._started, self._first = 0.0, 0
        self._bar: Bar | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stack.close()
            self._stage, self._started, self._first = stage, time.monotonic(), done
            self._bar = self._stack.enter_context(item_progress(stage))
        if self._bar is not None:
            self._bar(done, total)
        if not sys.stderr.isatty():
            self._line(done, total)

    def _line(self, done: int, total: int) -> None:
        seconds, made = time.monotonic() - self._started, done - self._first
        if not made:
            click.echo(f"{self._stage}: {done} of {total}", err=True)
        else:
            left = seconds / made * (total - done)
            click.echo(
                f"{self._stage}: {done} of {total} after {seconds:.0f} s, {left:.0f} s left",
                err=True,
            )


def _summarize(report: Report, output: Path, seconds: float) -> None:
    found = report.accuracy
    click.echo(
        f"wrote {output} in {seconds:.0f} s: {format_bytes(report.size)} "
        f"({report.size / report.size_before:.0%} of {format_bytes(report.size_before)})"
    )
    rows = [("bits a weight", f"{report.effective_bits:.2f}, scales counted")]
    if found is not None:
        rows += [
            ("perplexity", f"{found.candidate}, before {found.reference}: {found.change}"),
            ("KL divergence", f"{found.kl_mean:.4g} nats, 99th percentile {found.kl_p99:.3g}"),
            ("same top token", f"{found.top1:.1%}"),
        ]
    for worst in report.worst()[:1]:
        rows.append(("worst linear", f"{worst.name} ({worst.suggestion()})"))
    click.echo(format_columns(rows))
    for note in [*report.notes, *report.refusals()]:
        click.echo(f"note: {printable(note)}")
    kv = report.kv_cache_dtype
    more = f" --kv-cache-dtype {kv}" if kv == "int8" else ""
    click.echo(f"next: slipstream build {shlex.quote(str(output))} -o engine{more}")
