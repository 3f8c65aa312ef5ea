"""``slipstream build``."""

from __future__ import annotations

import re
import shlex
import sys
import time
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
_SM = re.compile(r"sm_(\d+)(\d)")


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
        _check_kernels(kernels, options)
        _build(checkpoint, output, options)
        if tune:
            _tune(output)
        _keep_kernels(output, kernels)


def _check_tunable(options: BuildOptions, estimate: bool) -> None:
    from slipstream.builder.targets.base import create_target

    target = create_target(options.target).name
    if target != "cuda":
        raise click.UsageError(f"--tune is for NVIDIA GPUs and the target is {target}")
    if estimate:
        raise click.UsageError("--tune needs an engine and --estimate makes none; leave one out")


def _check_kernels(kernels: str, options: BuildOptions) -> None:
    from slipstream.builder.targets.base import create_target

    if kernels in ("auto", "none"):
        return
    if not _SM.fullmatch(kernels):
        raise click.UsageError(f"--kernels is {kernels!r}; use auto, none or a GPU such as sm_90")
    if (target := create_target(options.target).name) != "cuda":
        raise click.UsageError(f"--kernels is for NVIDIA GPUs and the target is {target}")


def _keep_kernels(output: Path, kernels: str) -> None:
    """Compile for the GPU that was named, or is here and takes the engine."""
    from slipstream.builder.engine import open_engine
    from slipstream.plugins.cuda.detect import gpu_capability, gpu_works, sm
    from slipstream.runtime.executors import keep_kernels
    from slipstream.runtime.loading import runtime_config

    engine = open_engine(output)
    if engine.manifest.target != "cuda" or kernels == "none":
        return
    named = _SM.fullmatch(kernels)
    if named is None and not gpu_works():
        return
    capability = (int(named[1]), int(named[2])) if named else gpu_capability()
    assert capability is not None
    if int(sm(capability)[3:]) < int(engine.manifest.capability[3:]):
        click.echo(f"no kernels kept: {sm(capability)} is older than {engine.manifest.capability}")
        return
    started = time.monotonic()
    count = keep_kernels(engine, runtime_config(engine, {}), capability)
    seconds = time.monotonic() - started
    click.echo(f"compiled {count} kernels for {sm(capability)} in {seconds:.1f} s")


def _tune(output: Path) -> None:
    from slipstream.builder.engine import open_engine
    from slipstream.runtime.executors import tune as tune_engine

    started = time.monotonic()
    report = tune_engine(open_engine(output))
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
    return [
        ("task", describe_task(planned.pooling)),
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
            "--kv-cache-bytes sets how much of it is used)",
        ),
    ]


def _build(checkpoint: str, output: Path, options: BuildOptions) -> None:
    from slipstream.builder.build import build as build_engine

    if not sys.stderr.isatty():  # a terminal shows a bar instead
        click.echo(f"building {output} from {checkpoint}", err=True)
    started = time.monotonic()
    with byte_progress(f"building {output.name}") as report:
        report(0, None)
        manifest = build_engine(checkpoint, output, options, report)
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
    click.echo()
    path = shlex.quote(str(output))
    asked = (
        f'generate {path} "Why is the sky blue?"' if manifest.pooling is None else f"serve {path}"
    )
    click.echo(f"next: slipstream {asked}")


def _echo_kernels(kernels: dict[str, int]) -> None:
    click.echo(format_columns([("kernel", "linears"), *kernels.items()]))
