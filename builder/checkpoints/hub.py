"""Checkpoints of the Hugging Face hub: downloaded once into its cache, then read as a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.builder.checkpoints.huggingface import reader
from slipstream.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from slipstream.builder.checkpoints.base import Checkpoint

# What the reader needs; pickled weights and other frameworks' copies stay where they are, and so do
# other copies of the weights: folders such as original/, consolidated files, adapters.
_FILES = ["*.json", "*.safetensors", "*.jinja"]
_OTHERS = ["*/*", "consolidated*", "adapter_*"]


def open_checkpoint(source: str | os.PathLike[str], *, strict: bool = False) -> Checkpoint:
    """``fetch`` the model with this hub id and open it."""
    return reader.open_checkpoint(fetch(source), strict=strict)


def fetch(source: str | os.PathLike[str]) -> Path:
    """The directory of the model with this hub id, downloaded unless it is in the hub's cache.

    Raises CheckpointError when it cannot be had, MissingDependencyError without huggingface_hub.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            f"{source} is not a local path, and reading from the hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    name = os.fspath(source)
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_OTHERS))
    # Its errors are OSErrors (HTTP, offline, not found) or ValueErrors (a malformed id).
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{name} is not a local path and could not be fetched from the Hugging Face hub "
            f"({reason}); check the spelling and the network, log in for a gated model, or pass "
            "the directory of a checkpoint that is already here"
        ) from error
