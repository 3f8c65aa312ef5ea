"""``model.json``: which engine a version of a model serves, and with which runtime options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream.builder.engine import is_engine, open_engine
from slipstream.cores import usable_cores
from slipstream.errors import InvalidRequestError
from slipstream.plugins.cuda.detect import gpu_capability

FILE = "model.json"
_MODEL = "model"


@dataclass(frozen=True, slots=True)
class Settings:
    """``options`` are fields of ``RuntimeConfig``; ``model`` is an engine, or a checkpoint."""

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write ``model.json``."""
        text = json.dumps({_MODEL: self.model, **self.options}, indent=2)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")

    def shared_among(self, instances: int) -> Settings:
        """These settings for one of several processes that share the cores of this one."""
        if instances < 2 or "num_threads" in self.options or not self._on_cpu():
            return self
        threads = max(1, usable_cores() // instances)
        return Settings(self.model, {**self.options, "num_threads": threads})

    def _on_cpu(self) -> bool:
        path = Path(self.model)
        if is_engine(path):
            return open_engine(path).manifest.target == "cpu"
        return gpu_capability() is None


def read_settings(directory: Path) -> Settings:
    """Read ``model.json``; a relative path of the model starts at its directory.

    Raises ``InvalidRequestError``.
    """
    file = directory / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{file} cannot be read ({error}); write it with slipstream triton-repo"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get(_MODEL), str):
        raise InvalidRequestError(
            f'{file} does not name its model; expected {{"{_MODEL}": "path of an engine", ...}}'
        )
    model, options = values.pop(_MODEL), values
    beside = directory / model
    return Settings(str(beside) if beside.exists() else model, options)
