"""Options that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

POSITIVE = click.IntRange(min=1)
_OPTIONS = (
    click.option("--input-len", type=POSITIVE, default=128, help="Tokens of a prompt."),
    click.option("--output-len", type=POSITIVE, default=128, help="Tokens of an answer."),
    click.option("--seed", default=0, help="Seed of the prompts."),
    click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write the report to this file too, with versions and hardware.",
    ),
)


def bench_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add lengths, seed and ``--json`` (as ``json_file``)."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
