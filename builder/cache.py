"""Engines that were built on the way to something else, kept under a key of everything that made
them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slipstream import __version__
from slipstream.builder.build import Progress, build
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.engine import FORMAT_VERSION, is_engine
from slipstream.builder.options import BuildOptions


def cached_engine(
    source: str | Path, options: Mapping[str, Any], progress: Progress | None = None
) -> Path:
    """The engine of a checkpoint, built unless the cache holds it.

    ``options`` may mix fields of ``BuildOptions`` with those of the runtime that a build ignores.
    ``progress`` is told what ``build`` tells it, when there is something to build.
    """
    known = BuildOptions.__dataclass_fields__
    recipe = BuildOptions(**{name: value for name, value in options.items() if name in known})
    path = Path(source)
    checkpoint = path if path.exists() else open_checkpoint(source).path
    engine = cache_directory() / f"{checkpoint.stem}-{_key(checkpoint, recipe)}"
    if not is_engine(engine):
        build(checkpoint, engine, recipe, progress)
    return engine


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/slipstream/engines``, by default under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "slipstream" / "engines"


def _key(checkpoint: Path, recipe: BuildOptions) -> str:
    content = {
        "files": list(_fingerprint(checkpoint)),
        "recipe": asdict(recipe),
        "version": __version__,
        "format": FORMAT_VERSION,
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(checkpoint: Path) -> Iterator[tuple[str, int, int]]:
    # Size and time of change, not content: hashing gigabytes on every start would cost more than
    # loading them.
    files = sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]
    for file in files:
        status = file.stat()
        yield str(file.resolve()), status.st_size, status.st_mtime_ns
