"""``slipstream convert``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast, get_args

import click

from slipstream.builder.options import OutputFormat
from slipstream.server.command import Command
from slipstream.server.options import output_option
from slipstream.server.progress import item_progress
from slipstream.server.text import format_bytes


@click.command(cls=Command)
@click.argument("checkpoint")
@output_option("Directory to write, which must not exist.", required=True)
@click.option(
    "--format", type=click.Choice(get_args(OutputFormat)), required=True, help="Layout to write."
)
def convert(checkpoint: str, output: Path, format: str) -> None:
    """Change the layout of a quantized checkpoint.

    CHECKPOINT is a quantized Hugging Face directory or hub id. Codes, scales and zero points are
    kept as they are; what the layout cannot express exactly is refused.

    \b
    Examples:
      slipstream convert model-gptq -o model-ct --format compressed-tensors
      slipstream convert model-ct -o model-awq --format awq
    """
    # Imported here, with the readers behind it, so that bad usage is reported at once.
    from slipstream.quantize.convert import convert as convert_checkpoint

    started = time.monotonic()
    with item_progress(f"writing {output.name}") as report:
        convert_checkpoint(checkpoint, output, cast("OutputFormat", format), report)
    size = sum(file.stat().st_size for file in output.iterdir())
    click.echo(f"wrote {output} in {time.monotonic() - started:.1f} s: {format_bytes(size)}")
