"""Where a checkpoint is made: beside the directory asked for, whose name it takes at the end.

It remembers what it is made of and which layers are done, so that a run can go on where another
ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream import __version__
from slipstream.builder.checkpoints.base import Checkpoint, read_json
from slipstream.errors import BuildError
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.report.record import STEM

log = logging.getLogger(__name__)

_STATE, _LOCK, _CHECKPOINT = "state.json", "lock", "checkpoint"
REPORT = f"{STEM}.json"
# Options that change what is done with a result, not the result.
_INDIFFERENT = ("max_ppl_increase", "eval_dataset")


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a finished layer leaves behind besides its shard, as JSON: rows of the report, what the
    layout said of its modules, and its KV scales."""

    rows: list[dict[str, Any]]
    modules: dict[str, Any]
    kv: tuple[float, float] | None


@dataclass(slots=True)
class Staging:
    """An unfinished checkpoint; ``run`` is what it is made of, ``started`` whether its first shard
    is there."""

    root: Path
    run: Mapping[str, Any]
    qformats: dict[str, str] | None = None
    layers: list[LayerRecord] = field(default_factory=list)
    seconds: float = 0.0
    started: bool = False

    @property
    def checkpoint(self) -> Path:
        """The directory that becomes the result."""
        return self.root / _CHECKPOINT

    def save(self) -> None:
        """Writes the state; what it says is done is on disk already."""
        layers = [[layer.rows, layer.modules, layer.kv] for layer in self.layers]
        state = {"run": self.run, "qformats": self.qformats, "seconds": self.seconds}
        new = self.root / f"{_STATE}.new"
        new.write_text(json.dumps({**state, "layers": layers}), encoding="utf-8")
        new.replace(self.root / _STATE)

    def restore(self) -> bool:
        """Takes up the state of an earlier run; False if there is none.

        Raises BuildError if it was of another checkpoint or had other options.
        """
        if not (self.root / _STATE).is_file():
            return False
        state = read_json(self.root / _STATE)
        changes = list(_changes(state["run"], json.loads(json.dumps(self.run))))
        if changes:
            raise BuildError(
                f"{self.root} cannot be gone on with: {'; '.join(changes)}. Give what was given "
                "then, or start again without --resume"
            )
        self.started = True
        self.qformats, self.seconds = state["qformats"], state["seconds"]
        self.layers = [
            LayerRecord(rows, modules, None if kv is None else (kv[0], kv[1]))
            for rows, modules, kv in state["layers"]
        ]
        return True

    def publish(self, output: Path) -> None:
        """Gives the finished checkpoint its name, replacing an older result."""
        if output.exists():
            shutil.rmtree(output)
        self.checkpoint.rename(output)
        shutil.rmtree(self.root)


def check_output(output: Path, source: Path) -> None:
    """BuildError if ``output`` may not be written: it is something else, or it is the source."""
    resolved, origin = output.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise BuildError(f"{output} and the checkpoint {source} overlap; choose another -o")
    if output.exists() and not (output / REPORT).is_file():
        raise BuildError(
            f"{output} exists and was not written by slipstream quantize or convert; choose "
            "another -o or remove it"
        )


def describe_run(checkpoint: Checkpoint, options: QuantizeOptions) -> dict[str, Any]:
    """What a result follows from: the version, the source's files and the options, as JSON."""
    path = checkpoint.path
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    stats = {file.name: file.stat() for file in [*files, *path.glob("config.json")]}
    values = {
        name: getattr(options, name)
        for name in options.__dataclass_fields__
        if name not in _INDIFFERENT
    }
    text = None
    if options.calib_dataset is not None and Path(options.calib_dataset).is_file():
        text = hashlib.sha256(Path(options.calib_dataset).read_bytes()).hexdigest()
    return {
        "version": __version__,
        "checkpoint": str(path.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "calibration text": text,
        **values,
    }


@contextmanager
def staging(output: Path, run: Mapping[str, Any], *, resume: bool) -> Iterator[Staging]:
    """A place to make ``output`` in, with what an earlier run left there if ``resume``.

    It is removed when the block fails, but kept on Ctrl-C, and with ``resume``, for the next run to
    go on with. Raises BuildError for what cannot be written.
    """
    root = output.parent / f".{output.name}.quantizing"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            place = Staging(root, run)
            if not (resume and place.restore()):
                _clear(root)
            place.checkpoint.mkdir(exist_ok=True)
            with _kept_or_removed(place, resume):
                yield place
    except OSError as error:
        raise BuildError(
            f"cannot write {output}: {error.strerror or error}; make room or choose another -o"
        ) from error


@contextmanager
def _kept_or_removed(place: Staging, resume: bool) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if place.layers and (resume or isinstance(error, KeyboardInterrupt)):
            log.warning(
                "%d layers are done and kept in %s; give --resume to go on with them",
                *(len(place.layers), place.root),
            )
        else:
            shutil.rmtree(place.root)
        raise


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keeps a second run out until the block ends."""
    descriptor = os.open(root / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BuildError(f"another run is writing into {root}; wait for it to end") from error
    else:
        yield
    finally:
        os.close(descriptor)


def _clear(root: Path) -> None:
    for child in root.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != _LOCK:
            child.unlink()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if name == "files" and old != new:
            yield "the checkpoint has changed"
        elif old != new:
            yield f"{name} was {old!r} and is {new!r}"
