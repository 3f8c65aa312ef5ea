"""Writes a model repository, and the backend directory that it needs, for a stock Triton."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slipstream.builder.engine import engine_contents, open_engine
from slipstream.builder.output import check_output, publish, scratch
from slipstream.errors import InvalidRequestError
from slipstream.runtime.loading import runtime_config
from slipstream.runtime.pooling import require_text
from slipstream.server.triton.ensemble import NAME as ENSEMBLE
from slipstream.server.triton.ensemble import ensemble_config
from slipstream.server.triton.settings import FILE, Settings

VersionPolicy = Literal["latest", "all"]
BACKEND = "slipstream"
_ENGINE = "engine"
_CONFIG_FILE = "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_POLICIES: Mapping[VersionPolicy, str] = {"latest": "latest { num_versions: 1 }", "all": "all { }"}
_HEADER = "# Written by slipstream triton-repo."
_CONFIG = """\
{header} The backend adds the inputs and outputs.
backend: "{backend}"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
version_policy: {{ {policy} }}
instance_group [ {{ kind: KIND_MODEL, count: {instances} }} ]
"""


@dataclass(frozen=True, slots=True)
class Deployment:
    """How Triton is to serve an engine.

    name             the model's name in URLs.
    version          the number of the version that is written; others are kept.
    version_policy   which versions Triton serves: the ``latest``, or ``all`` of them.
    instances        processes, each with weights and a KV cache of its own; one shares its batch
                     among all requests, and is what a device needs.
    copy_engine      copy the engine into the repository, which can then be moved.
    ensemble         write a model ``ensemble`` beside it, for clients of TensorRT-LLM.

    Raises ``InvalidRequestError``.
    """

    name: str
    version: int = 1
    version_policy: VersionPolicy = "latest"
    instances: int = 1
    copy_engine: bool = False
    ensemble: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequestError(
                f"{self.name!r} cannot be a model's name; use letters, digits, '.', '_' and '-'"
            )
        if self.ensemble and self.name == ENSEMBLE:
            raise InvalidRequestError(
                f"{self.name!r} is the name of the ensemble itself; give the model another one"
            )
        for field in ("version", "instances"):
            if getattr(self, field) < 1:
                raise InvalidRequestError(
                    f"{field} is {getattr(self, field)}; it must be at least 1"
                )


@dataclass(frozen=True, slots=True)
class Written:
    """``models/NAME`` and ``backends/slipstream``."""

    model: Path
    backend: Path


def write_repository(
    directory: Path, engine: Path, deployment: Deployment, options: Mapping[str, Any]
) -> Written:
    """Write ``models/NAME`` and ``backends/slipstream`` below ``directory``.

    ``options`` are fields of ``RuntimeConfig``. A version that stands there is replaced. Raises
    ``InvalidRequestError`` for what could not be served.
    """
    model, backend = directory / "models" / deployment.name, directory / "backends" / BACKEND
    version = model / str(deployment.version)
    _check(engine, version, deployment, options)
    try:
        with scratch(version) as staging:
            if deployment.copy_engine:
                shutil.copytree(engine, staging / _ENGINE)
            source = _ENGINE if deployment.copy_engine else str(engine.resolve())
            Settings(source, options).write(staging)
            publish(staging, version)
    except OSError as error:
        raise InvalidRequestError(
            f"cannot write {version}: {error.strerror or error}; choose another -o"
        ) from error
    config = _CONFIG.format(
        header=_HEADER,
        backend=BACKEND,
        policy=_POLICIES[deployment.version_policy],
        instances=deployment.instances,
    )
    (model / _CONFIG_FILE).write_text(config, encoding="utf-8")
    if deployment.ensemble:
        ensemble = model.with_name(ENSEMBLE)
        (ensemble / "1").mkdir(parents=True, exist_ok=True)  # Triton wants a version of it
        (ensemble / _CONFIG_FILE).write_text(ensemble_config(deployment.name), encoding="utf-8")
    backend.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("model.py"), backend)
    return Written(model, backend)


def _check(engine: Path, version: Path, deployment: Deployment, options: Mapping[str, Any]) -> None:
    if deployment.ensemble:
        _check_ensemble(version.parent.with_name(ENSEMBLE), deployment.name)
    opened = open_engine(engine)
    require_text(opened.manifest.pooling)
    manifest = opened.manifest
    runtime_config(opened, options)
    if engine.resolve().is_relative_to(version.resolve()):
        raise InvalidRequestError(
            f"{engine} is in {version}, which is to be replaced; move the engine or choose another "
            "version"
        )
    check_output(version, "version of a Triton model", _contents)
    configuration = version.parent / "config.pbtxt"
    if configuration.exists() and not configuration.read_text().startswith(_HEADER):
        raise InvalidRequestError(
            f"{configuration} was not written by slipstream triton-repo; move it, or choose "
            "another --name or -o"
        )
    if manifest.target != "cpu" and deployment.instances > 1 and "kv_cache_bytes" not in options:
        raise InvalidRequestError(
            f"{deployment.instances} instances share the GPU, and each would take all of its free "
            "memory; say with --kv-cache-bytes how much of it one may have"
        )


def _check_ensemble(directory: Path, model: str) -> None:
    config = directory / _CONFIG_FILE
    if config.is_file() and f'model_name: "{model}"' not in config.read_text(encoding="utf-8"):
        raise InvalidRequestError(
            f"{directory} belongs to another model; rename it (a directory's name is what clients "
            "ask for), or choose another output"
        )


def _contents(version: Path) -> set[str] | None:
    """What a version that was written here consists of."""
    if not (version / FILE).is_file():
        return None
    copied = version / _ENGINE
    whole = copied.is_dir() and {file.name for file in copied.iterdir()} <= (
        engine_contents(copied) or set()
    )
    return {FILE, _ENGINE} if whole else {FILE}
