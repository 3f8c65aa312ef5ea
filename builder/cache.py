"""Engines that were built on the way to something else, kept under a key of everything that made
them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slipstream import __version__
from slipstream.builder.build import Progress, build_once
from slipstream.builder.checkpoints import files_of, on_disk
from slipstream.builder.engine import FORMAT_VERSION, MANIFEST, is_engine
from slipstream.builder.options import BuildOptions
from slipstream.builder.output import discard, scratch, unfinished
from slipstream.builder.targets.base import create_target
from slipstream.errors import BuildError
from slipstream.sizes import parse_size

LIMIT = "SLIPSTREAM_CACHE_SIZE"
_DEFAULT_LIMIT = "100G"


def cached_engine(
    source: str | Path, options: Mapping[str, Any], progress: Progress | None = None
) -> Path:
    """The engine of a checkpoint, built unless the cache holds it.

    ``options`` may mix fields of ``BuildOptions`` with those of the runtime that a build ignores.
    ``progress`` is told what ``build`` tells it, when there is something to build. A process that
    is building the same is waited for. When the cache has grown beyond its limit, the engines that
    were used longest ago are removed.
    """
    limit = size_limit()
    known = BuildOptions.__dataclass_fields__
    recipe = BuildOptions(**{name: value for name, value in options.items() if name in known})
    checkpoint = on_disk(source).absolute()
    label = checkpoint.resolve().name.removesuffix(".gguf")
    engine = cache_directory() / f"{label}-{_key(checkpoint, recipe)}"
    if not is_engine(engine) and build_once(checkpoint, engine, recipe, progress):
        prune(limit, keep=engine)
    with suppress(OSError):  # a cache that may only be read
        os.utime(engine / MANIFEST)
    return engine


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/slipstream/engines``, by default under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "slipstream" / "engines"


def size_limit() -> int:
    """The bytes that the cache may take: ``$SLIPSTREAM_CACHE_SIZE``, by default 100 GiB."""
    try:
        return parse_size(os.environ.get(LIMIT) or _DEFAULT_LIMIT)
    except ValueError as error:
        raise BuildError(f"{LIMIT} is no size: {error}") from error


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """An engine in the cache: its checkpoint, its bytes, and when it was last used (Unix time).

    ``usable`` says whether it can be asked for again: its checkpoint is there, and it is of this
    version of Slipstream.
    """

    path: Path
    source: str
    size: int
    used: float
    usable: bool


def cached_engines() -> list[CachedEngine]:
    """Every engine of the cache, the one that was used last first."""
    directory = cache_directory()
    paths = [path for path in directory.glob("*") if is_engine(path)] if directory.is_dir() else []
    found = [engine for path in paths if (engine := _described(path)) is not None]
    return sorted(found, key=lambda engine: -engine.used)


def prune(
    limit: int, *, keep: Path | None = None, unusable: bool = False
) -> Sequence[CachedEngine]:
    """Remove the engines that were used longest ago until the cache takes at most ``limit`` bytes,
    and with ``unusable`` all that cannot be asked for again; also what killed builds have left.

    ``keep`` stays whatever it takes. Returns what was removed. Processes that have loaded an engine
    keep it.
    """
    for place in unfinished(cache_directory()):
        # An engine that stands there is whole: whoever waited for it has made the scratch anew.
        with suppress(BuildError), scratch(place):  # unless it is being made
            pass
    removed, taken = [], 0
    for engine in cached_engines():
        taken += engine.size
        unwanted = taken > limit or (unusable and not engine.usable)
        if unwanted and engine.path != keep:
            taken -= engine.size
            with suppress(BuildError, FileNotFoundError):  # it is being made anew, or gone already
                discard(engine.path)
                removed.append(engine)
    return removed


def _described(path: Path) -> CachedEngine | None:
    """None for an engine that has just been removed, or that nothing can be told of."""
    try:
        size = sum(file.stat().st_size for file in path.iterdir())
        used = (path / MANIFEST).stat().st_mtime
        manifest = json.loads((path / MANIFEST).read_bytes())
        source, version = str(manifest["source"]), manifest["slipstream_version"]
    except OSError:
        return None
    except (ValueError, RecursionError, KeyError, TypeError):
        return CachedEngine(path, "unknown", size, used, usable=False)
    return CachedEngine(path, source, size, used, version == __version__ and Path(source).exists())


def _key(checkpoint: Path, recipe: BuildOptions) -> str:
    # What auto meant when this machine had another device is another engine.
    recipe = replace(recipe, target=create_target(recipe.target).name)
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
    for file in files_of(checkpoint):
        with suppress(FileNotFoundError):  # gone since; whoever reads it will say so
            status = file.stat()
            yield f"{file.name}: {file.resolve()}", status.st_size, status.st_mtime_ns
