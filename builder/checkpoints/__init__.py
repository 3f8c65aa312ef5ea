"""Reading checkpoints: every weight format into one representation, lazily."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Literal, cast

from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.errors import CheckpointError

__all__ = ["Checkpoint", "files_of", "on_disk", "open_checkpoint"]

# Each module has `open_checkpoint(source, strict=...)`, and but for the hub's `files_of(path)`; it
# is imported when a checkpoint of its kind is wanted.
_READERS = {
    "directory": "slipstream.builder.checkpoints.huggingface.reader",
    "gguf": "slipstream.builder.checkpoints.gguf.reader",
    "hub": "slipstream.builder.checkpoints.hub",
}
_GGUF_MAGIC = b"GGUF"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_checkpoint(source: str | os.PathLike[str], *, strict: bool = False) -> Checkpoint:
    """Opens a Hugging Face directory, a GGUF file or a model of the Hugging Face hub.

    ``source`` is a path or a hub id such as ``Qwen/Qwen3-0.6B``; a path that exists wins. A GGUF
    file is known by its first bytes, whatever its name. Of a model that sees or hears, too, the
    text model is opened, and what is left out is logged. Raises CheckpointError when there is
    nothing readable there, and with ``strict`` for a checkpoint of more than a text model.
    """
    reader = import_module(_READERS[_kind(source)])
    return cast("Checkpoint", reader.open_checkpoint(source, strict=strict))


def on_disk(source: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint, after downloading it if it is a hub id; CheckpointError as for
    ``open_checkpoint``."""
    if _kind(source) != "hub":
        return Path(source)
    return cast("Path", import_module(_READERS["hub"]).fetch(source))


def files_of(path: Path) -> list[Path]:
    """Every file that reading a checkpoint on disk opens, if it is there: what an engine of it
    follows from."""
    return cast("list[Path]", import_module(_READERS[_kind(path)]).files_of(path))


def _kind(source: str | os.PathLike[str]) -> Literal["directory", "gguf", "hub"]:
    path = Path(source)
    if path.is_dir():
        return "directory"
    if path.is_file():
        if path.suffix == ".gguf" or _begins_as_gguf(path):
            return "gguf"
        raise CheckpointError(
            f"{path} is neither a directory with config.json nor a GGUF file; pass the directory "
            "that holds the checkpoint"
        )
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(os.fspath(source)):
        return "hub"
    raise CheckpointError(
        f"{path} does not exist; pass a directory with config.json, a .gguf file or a hub id such "
        "as Qwen/Qwen3-0.6B"
    )


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path"
        ) from error
