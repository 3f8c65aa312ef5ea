"""Executors by the target an engine was built for."""

from __future__ import annotations

from importlib import import_module

from slipstream.builder.engine import Engine
from slipstream.errors import EngineMismatchError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.base import Executor

# target -> "module:class"; a class is called with (engine, configuration).
_EXECUTORS = {
    "cpu": "slipstream.runtime.executors.cpu:CPUExecutor",
}


def create_executor(engine: Engine, config: RuntimeConfig) -> Executor:
    """Load an engine on its target's device, importing only that executor's libraries.

    Raises ``EngineMismatchError`` for a target that this version cannot run.
    """
    target = engine.manifest.target
    if target not in _EXECUTORS:
        raise EngineMismatchError(
            f"the engine in {engine.path} was built for target {target!r}; this version runs"
            f" {', '.join(_EXECUTORS)}. Rebuild it: {engine.manifest.command}"
        )
    module, name = _EXECUTORS[target].split(":")
    executor: Executor = getattr(import_module(module), name)(engine, config)
    return executor
