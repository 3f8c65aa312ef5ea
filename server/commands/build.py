"""``slipstream build``."""

from __future__ import annotations

import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slipstream.builder.contract import bytes_per_token, kv_dtype_of
from slipstream.server.command import Command
from slipstream.server.options import build_options, output_option
from slipstream.server.progress import byte_progress
from slipstream.server.text import format_bytes, format_columns

if TYPE_CHECKING:
    from slipstream.builder.build import Plan
    from slipstream.builder.engine import Manifest
    from slipstream.builder.options import BuildOptions

# Interpreter, onnxruntime and tokenizer: 170 to 260 MiB were measured with SmolLM2-135M.
_PROGRAM_BYTES = 200 << 20


@click.command(cls=Command)
@click.argument("checkpoint")
@output_option("Directory of the engine; an engine that stands there is replaced.")
@build_options
@click.option(
    "--estimate",
    is_flag=True,
    help="Print what the engine would need, without reading weights or writing anything.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="After building for an NVIDIA GPU: time every kernel's variants on the one that is here "
    "and keep the quickest in tactics.json (a few minutes).",
)
@click.option(
    "--kernels",
    default="auto",
    show_default=True,
    metavar="auto|none|sm_NN",
    help="For an NVIDIA GPU: compile all kernels and keep them in the engine, so that it starts "
    "quickly on a new machine: for the GPU that is here, if there is one (auto), or for one that "
    "is not (such as sm_90).",
)
def build(
    checkpoint: str,
    output: Path | None,
    options: BuildOptions,
    estimate: bool,
    tune: bool,
    kernels: str,
) -> None:
    """Compile a checkpoint into an engine.

    CHECKPOINT is a Hugging Face directory, a .gguf file or a hub id such as Qwen/Qwen3-0.6B.
    Weights that are quantized in it stay as they are.

    \b
    Examples:
      slipstream build SmolLM2-135M-Instruct.Q4_1.gguf -o engine
      slipstream build Qwen/Qwen3-0.6B -o engine --quantization int4_wo --max-seq-len 4096
      slipstream build Qwen/Qwen3-0.6B --quantization int8_wo --estimate
    """
    if tune:
        _check_tunable(options, estimate)
    if estimate:
        _estimate(checkpoint, options)
    elif output is None:
        raise click.UsageError("say where to write the engine: -o DIRECTORY (or use --estimate)")
    else:
        from slipstream.server.engine_kernels import kernel_capability

        capability = kernel_capability(kernels, options)
        _build(checkpoint, output, options, capability)
        if tune:
            _tune(output, capability)


def _check_tunable(options: BuildOptions, estimate: bool) -> None:
    from slipstream.builder.targets.base import create_target

    target = create_target(options.target).name
    if target != "cuda":
        raise click.UsageError(f"--tune is for target cuda and the target is {target}")
    if estimate:
        raise click.UsageError("--tune needs an engine and --estimate makes none; leave one out")


def _tune(output: Path, capability: tuple[int, int] | None) -> None:
    from slipstream.builder.engine import open_engine
    from slipstream.runtime.executors import tune as tune_engine
    from slipstream.server.engine_kernels import compile_again

    started = time.monotonic()
    report = tune_engine(open_engine(output))
    if capability is not None:
        compile_again(open_engine(output), capability)
    click.echo(f"tuned {len(report)} shapes in {time.monotonic() - started:.0f} s")


def _estimate(checkpoint: str, options: BuildOptions) -> None:
    from slipstream.builder.build import plan
    from slipstream.server.engine_summary import count_kernels

    planned = plan(checkpoint, options)
    click.echo(format_columns(_needs(planned), indent=""))
    click.echo()
    _echo_kernels(count_kernels(planned.program.graph))


def _needs(planned: Plan) -> list[tuple[str, str]]:
    from slipstream.builder.parameters import count_parameters
    from slipstream.server.engine_summary import describe_parameters, describe_task, step_weights

    limits, per_token = planned.limits, bytes_per_token(planned.caches)
    fixed = planned.weight_bytes + _PROGRAM_BYTES
    full_batch = fixed + limits.max_batch_size * planned.sequence_kv_bytes
    ranks = [] if planned.ranks == 1 else [("ranks", f"{planned.ranks}; sizes are of one of them")]
    return [
        ("task", describe_task(planned.pooling)),
        *ranks,
        ("parameters", describe_parameters(count_parameters(planned.checkpoint.config))),
        ("weights", format_bytes(planned.weight_bytes)),
        *step_weights(planned.program.graph).describe(),
        ("KV per token", f"{format_bytes(per_token)} ({kv_dtype_of(planned.caches)})"),
        (
            "KV of one sequence",
            f"{format_bytes(planned.sequence_kv_bytes)} ({limits.max_seq_len} tokens)",
        ),
        (
            "memory needed",
            f"{format_bytes(fixed + planned.sequence_kv_bytes)} (weights, one sequence and about "
            f"{format_bytes(_PROGRAM_BYTES)} for the program)",
        ),
        (
            "for a full batch",
            f"{format_bytes(full_batch)} ({limits.max_batch_size} sequences of full length; "
            f"--kv-cache-bytes sets how much of it is used{' by all ranks' if ranks else ''})",
        ),
    ]


def _build(
    checkpoint: str, output: Path, options: BuildOptions, capability: tuple[int, int] | None
) -> None:
    from slipstream.builder.build import build as build_engine
    from slipstream.server.engine_kernels import compile_aside

    if not sys.stderr.isatty():  # a terminal shows a bar instead
        click.echo(f"building {output} from {checkpoint}", err=True)
    started = time.monotonic()
    compiler = None if capability is None else partial(compile_aside, capability=capability)
    with byte_progress(f"building {output.name}") as report:
        report(0, None)
        manifest = build_engine(checkpoint, output, options, report, compiler)
    _summarize(output, manifest, time.monotonic() - started)


def _summarize(output: Path, manifest: Manifest, seconds: float) -> None:
    from slipstream.builder.engine import Engine
    from slipstream.server.engine_summary import count_kernels, read_graph

    size = sum(file.stat().st_size for file in output.iterdir())
    click.echo(
        f"built {output} in {seconds:.1f} s: {format_bytes(size)}, {kv_dtype_of(manifest.caches)} "
        f"KV cache of {format_bytes(bytes_per_token(manifest.caches))} per token"
    )
    click.echo()
    _echo_kernels(count_kernels(read_graph(Engine(output, manifest))))
    if manifest.plans is not None:
        click.echo(f"\nnote: {manifest.plans.unverified}")
    click.echo()
    path = shlex.quote(str(output))
    asked = (
        f'generate {path} "Why is the sky blue?"' if manifest.pooling is None else f"serve {path}"
    )
    click.echo(f"next: slipstream {asked}")


def _echo_kernels(kernels: dict[str, int]) -> None:
    click.echo(format_columns([("kernel", "linears"), *kernels.items()]))
