"""Executors by the target an engine was built for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from slipstream.errors import EngineMismatchError, MissingDependencyError
from slipstream.extensions import entry_points

if TYPE_CHECKING:  # the table is also asked by those who run nothing
    from slipstream.builder.engine import Engine
    from slipstream.runtime.config import RuntimeConfig
    from slipstream.runtime.executors.base import Executor

# target -> "module:class", or a function; called with (engine, configuration). Packages add
# executors for targets of theirs by entry points of this group.
_GROUP = "slipstream.executors"
_EXECUTORS = {
    "cpu": "slipstream.runtime.executors.cpu:CPUExecutor",
    "cuda": "slipstream.runtime.executors.cuda.load:load_executor",
    "onnxruntime": "slipstream.runtime.executors.onnxruntime.executor:ONNXRuntimeExecutor",
    "tensorrt": "slipstream.runtime.executors.tensorrt.executor:TensorRTExecutor",
}
# The same for engines of several ranks.
_RANK_EXECUTORS = {
    "cpu": "slipstream.runtime.executors.ranks.executor:RankExecutor",
    "cuda": "slipstream.runtime.executors.ranks.gpu.executor:CUDARankExecutor",
}
_TUNERS = {"cuda": "slipstream.runtime.executors.cuda.tuning:tune_engine"}
_CHECKS = {
    "cuda": "slipstream.runtime.executors.cuda.device:require",
    "onnxruntime": "slipstream.runtime.executors.onnxruntime.provider:require",
    "tensorrt": "slipstream.runtime.executors.tensorrt.require:require",
}
# What begins, for an engine, all that takes long and needs no Python.
_AHEAD = {
    "cuda": "slipstream.runtime.executors.cuda.ahead:begin",
    "tensorrt": "slipstream.runtime.executors.cuda.ahead:begin",
}
# Packages that installing Slipstream alone does not bring.
_NEEDS = {
    "cuda": ("torch", "triton"),
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("torch", "triton"),
}
# What installs them, where it is no extra of ours of the target's name.
_INSTALLED_BY = {"onnxruntime": "onnxruntime, or onnxruntime-gpu for a GPU"}


def begin_loading(engine: Engine) -> None:
    """Start, in threads, what else importing a device's libraries would wait for; returns at once.
    The earlier this is called, the sooner ``create_executor`` returns; nobody has to.

    Raises ``MissingDependencyError`` for a package that the target needs.
    """
    # Ranks do so in processes of their own.
    if engine.manifest.target in _AHEAD and engine.manifest.ranks == 1:
        _load(_AHEAD, engine)(engine)


def check_device(engine: Engine) -> None:
    """Raise what a glance at this machine tells: a target that nothing here runs, a package or a
    device that is missing."""
    _find(known_executors(), engine)
    if engine.manifest.target in _CHECKS:
        _load(_CHECKS, engine)(engine.manifest)


def create_executor(engine: Engine, config: RuntimeConfig) -> Executor:
    """Load an engine on its target's device, importing only that executor's libraries.

    Raises ``EngineMismatchError`` for a target that this version cannot run and
    ``MissingDependencyError`` for a package that it needs.
    """
    table = known_executors() if engine.manifest.ranks == 1 else _RANK_EXECUTORS
    executor: Executor = _load(table, engine)(engine, config)
    return executor


def known_executors() -> dict[str, str]:
    """The table, and what installed packages add to it: target -> the place of the class."""
    return {**entry_points(_GROUP), **_EXECUTORS}


def tune(engine: Engine) -> Sequence[object]:
    """Time the kernels of an engine on its device and store the choice in the engine.

    Returns what was timed, by shape. Raises ``EngineMismatchError`` for a target that has no choice
    of kernels.
    """
    report: Sequence[object] = _load(_TUNERS, engine)(engine)
    return report


def _load(table: Mapping[str, str], engine: Engine) -> Callable[..., Any]:
    module, name = _find(table, engine).split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _find(table: Mapping[str, str], engine: Engine) -> str:
    """The entry of an engine's target, whose packages are there."""
    target = engine.manifest.target
    if target not in table:
        raise EngineMismatchError(
            f"the engine in {engine.path} was built for target {target!r}; this works for"
            f" {', '.join(table)}. Rebuild it: {engine.manifest.command}"
        )
    for package in _NEEDS.get(target, ()):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"the engine in {engine.path} runs on {target} and needs {package}, which is not "
                f"installed; install it: pip install "
                + _INSTALLED_BY.get(target, f"'slipstream[{target}]'")
            )
    return table[target]
