"""Where a checkpoint is made: beside the directory asked for, whose name it takes at the end.

It remembers what it is made of and which layers are done, so that a run can go on where another
ended.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream import __version__
from slipstream.builder.checkpoints.base import Checkpoint, read_json
from slipstream.builder.output import check_output, clear, locked, publish, remove
from slipstream.errors import BuildError
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.report.record import STEM
from slipstream.weights.json import Origin, read_fields

log = logging.getLogger(__name__)

_STATE, _CHECKPOINT = "state.json", "checkpoint"
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
        _check_place(output)
        publish(self.checkpoint, output)
        remove(self.root)


def check_result(output: Path, source: Path) -> None:
    """BuildError if ``output`` may not be written: it is something else, or it is the source."""
    if source.resolve() in output.resolve().parents:
        raise BuildError(f"{output} is in the checkpoint {source}; choose another -o")
    _check_place(output, source)


def _check_place(output: Path, *sources: Path) -> None:
    check_output(output, "quantized checkpoint of slipstream quantize", _contents, *sources)


def _contents(directory: Path) -> list[str] | None:
    """The files of the result in a directory, which its report lists."""
    report = directory / REPORT
    if not report.is_file():
        return None
    origin = Origin(report, "choose another -o or remove it", BuildError)
    return list(read_fields(report, origin).texts("files", ()))


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
        with locked(root):
            place = Staging(root, run)
            if not (resume and place.restore()):
                clear(root)
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
            remove(place.root)
        raise


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if name == "files" and old != new:
            yield "the checkpoint has changed"
        elif old != new:
            yield f"{name} was {old!r} and is {new!r}"
