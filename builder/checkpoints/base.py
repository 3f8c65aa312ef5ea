"""What a checkpoint is, whatever its format."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import CheckpointError
from slipstream.weights.json import Origin, read_fields
from slipstream.weights.tensor import KVScales, LazyTensor

logger = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """A model on disk: configuration, weights by name, tokenizer.

    Every method raises CheckpointError for what the checkpoint lacks or holds in a form that
    cannot be read.
    """

    @property
    def path(self) -> Path:
        """The directory or file it was read from."""

    @property
    def config(self) -> ModelConfig:
        """Shape and constants of the model."""

    @property
    def kv_scales(self) -> KVScales | None:
        """Those of an fp8 KV cache, if it was calibrated for one."""

    @property
    def pooling(self) -> StatedPooling | None:
        """What it makes in place of text, if it says so."""

    def names(self) -> tuple[str, ...]:
        """Every tensor, by its Hugging Face name: ``model.layers.0.self_attn.q_proj.weight``."""

    def tensor(self, name: str) -> LazyTensor:
        """One weight, not yet read. Its data is mapped from the file for as long as it is used."""

    def write_tokenizer(self, directory: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, generation_config.json and, when there is
        one, chat_template.jinja."""


def tell_left_out(path: Path, names: Sequence[str], *, strict: bool) -> None:
    """Logs which tensors of a checkpoint are not read; CheckpointError if there are any and none
    may be."""
    if names and strict:
        raise CheckpointError(
            f"{path} holds {len(names)} tensors that its text model has no use for, such as "
            f"{names[0]}, which would be left out; build without --strict-tensors"
        )
    if names:
        logger.warning(
            "%s: %d tensors that its text model has no use for are left out, such as %s",
            path.name, len(names), names[0],
        )  # fmt: skip


def check_read(checkpoint: Checkpoint) -> None:
    """CheckpointError for a tensor that the architecture does not read."""
    config = checkpoint.config
    architecture = architecture_of(config.architecture)
    others = set(checkpoint.names()) - set(architecture.shapes(config))
    unread = sorted(name for name in others if not architecture.is_redundant(config, name))
    if unread:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(unread)} tensors that {architecture.name} does not "
            f"read, such as {unread[0]}; its config does not describe it: check config.json "
            "against the model's page"
        )


def unknown_tensor(path: Path, name: str, known: Sequence[str]) -> CheckpointError:
    """The error for a tensor that a checkpoint does not have."""
    return CheckpointError(
        f"{path} has no tensor {name!r} among its {len(known)}; the file is incomplete or its "
        "configuration describes another model: download the checkpoint again"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when there is none."""
    return dict(read_fields(path).values)


def write_json(path: Path, data: object) -> None:
    """``data`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_config(bos: int | None, eos: Sequence[int]) -> dict[str, Any]:
    """The generation_config.json of a model that ships none."""
    config: dict[str, Any] = {}
    if bos is not None:
        config["bos_token_id"] = bos
    if eos:
        config["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    return config


def check_templates(templates: Mapping[str, str], origin: Origin) -> None:
    """Refuse a chat template that could not be rendered."""
    # Imported here because only models that chat need it.
    from slipstream.weights.templates import compile_template

    for name, source in templates.items():
        which = "the chat template" if name == "default" else f"the chat template {name}"
        compile_template(source, replace(origin, file=f"{origin.file}: {which}"))
