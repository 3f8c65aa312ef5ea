"""From what users call a model to a loaded engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipstream.builder.engine import is_engine, open_engine
from slipstream.runtime.executors import begin_loading
from slipstream.runtime.speculation.config import spelled_out
from slipstream.server.progress import byte_progress

if TYPE_CHECKING:
    from slipstream.runtime.loaded_engine import LoadedEngine


def begin(model: str) -> None:
    """Let an engine's device begin what it needs no Python for, while that imports the rest;
    nothing of a checkpoint. Raises what ``open_engine`` raises."""
    path = Path(model)
    if is_engine(path):
        begin_loading(open_engine(path))


def load_model(model: str, runtime: Mapping[str, Any]) -> LoadedEngine:
    """Load an engine, or the engine of a checkpoint, built with a progress bar unless it is cached.

    ``runtime`` holds fields of ``RuntimeConfig``. Raises what ``slipstream.runtime.loading.load``
    raises.
    """
    engine = engine_path(model, runtime)
    # Imported here, with onnxruntime behind it, so that bad usage is reported at once.
    from slipstream.runtime.loading import load

    return load(engine, runtime)


def engine_path(model: str, runtime: Mapping[str, Any]) -> Path:
    """The directory of an engine; that of a checkpoint is in the cache."""
    path = Path(model)
    if is_engine(path):
        return path
    options = spelled_out(runtime)
    # Imported here because running an engine needs none of the compiler's libraries.
    from slipstream.builder.cache import cached_engine

    with byte_progress("compiling") as bar:

        def report(done: int, total: int) -> None:
            if not announced:
                announced.append(True)
                click.echo(
                    f"compiling {model} for this machine; the engine is kept for next time",
                    err=True,
                )
            bar(done, total)

        announced: list[bool] = []
        return cached_engine(model, options, report)
