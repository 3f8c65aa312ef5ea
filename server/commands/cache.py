"""``slipstream cache list`` and ``slipstream cache prune``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from slipstream.server.command import Command
from slipstream.server.option_tables import size
from slipstream.server.text import format_bytes, format_columns


@click.command("list", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def list_engines(as_json: bool) -> None:
    """List the engines that were compiled on the way, the one that was used last first.

    An engine that is not usable is of another version of Slipstream, or its checkpoint is gone.

    \b
    Examples:
      slipstream cache list
      slipstream cache list --json | jq '.engines[].path'
    """
    # Imported here, with the compiler behind it, so that bad usage is reported at once.
    from slipstream.builder.cache import cache_directory, cached_engines, size_limit

    engines = cached_engines()
    if as_json:
        content = {
            "directory": str(cache_directory()),
            "limit": size_limit(),
            "engines": [{**asdict(engine), "path": str(engine.path)} for engine in engines],
        }
        click.echo(json.dumps(content, indent=2))
        return
    taken = sum(engine.size for engine in engines)
    click.echo(
        f"{cache_directory()}: {len(engines)} engines, {format_bytes(taken)} of at most "
        f"{format_bytes(size_limit())}"
    )
    rows = [
        (
            engine.path.name,
            format_bytes(engine.size),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(engine.used)),
            engine.source if engine.usable else f"{engine.source} (not usable)",
        )
        for engine in engines
    ]
    if rows:
        click.echo(format_columns([("engine", "size", "last used", "checkpoint"), *rows]))


@click.command("prune", cls=Command)
@click.option(
    "--max-size",
    type=size,
    help="Remove the engines that were used longest ago until the rest takes no more, such as 20G "
    "or 0.  [default: the cache's limit]",
)
def prune_engines(max_size: int | None) -> None:
    """Remove engines that were compiled on the way; they are compiled again when they are needed.

    Engines that cannot be used again go first: those of another version of Slipstream, and those
    whose checkpoint is gone. Then those that were used longest ago, until the rest takes no more
    than --max-size. What builds that were killed have left goes, too. An engine that is running
    stays in memory.

    \b
    Examples:
      slipstream cache prune
      slipstream cache prune --max-size 20G
    """
    # Imported here, with the compiler behind it, so that bad usage is reported at once.
    from slipstream.builder.cache import cached_engines, prune, size_limit

    removed = prune(size_limit() if max_size is None else max_size, unusable=True)
    for engine in removed:
        click.echo(f"removed {engine.path}")
    freed, left = (sum(engine.size for engine in some) for some in (removed, cached_engines()))
    click.echo(f"{format_bytes(freed)} are free, {format_bytes(left)} are left in the cache")
