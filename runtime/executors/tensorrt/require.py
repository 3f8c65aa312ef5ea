"""What a machine must have for the plans of an engine."""

from __future__ import annotations

import shlex

import torch

from slipstream.builder.engine import Manifest, Plans
from slipstream.errors import EngineMismatchError, MissingDependencyError
from slipstream.plugins.cuda.tensorrt import FLAVOURS, import_flavour, module_of
from slipstream.runtime.executors.cuda import device

_PACKAGES = {
    "tensorrt_rtx": "pip install 'slipstream[tensorrt]'",
    "tensorrt": "pip install tensorrt",
}


def require(manifest: Manifest) -> None:
    """Raise unless the package that made the plans of an engine is here, and a GPU that they are
    for.

    MissingDependencyError where there is no TensorRT, EngineMismatchError for another flavour,
    another version, libraries that do not load and a GPU that the plans are not for.
    """
    plans = plans_of(manifest)
    _require_package(plans, manifest.command)
    device.require(manifest)
    _require_gpu(plans, manifest)


def plans_of(manifest: Manifest) -> Plans:
    """The plans of an engine; EngineMismatchError where it has none."""
    if manifest.plans is None:
        raise EngineMismatchError(
            f"the engine names no plans of TensorRT; build it again: {manifest.command}"
        )
    return manifest.plans


def _require_package(plans: Plans, command: str) -> None:
    made_by = f"the engine's plans were made by {plans.flavour} {plans.version}"
    if plans.flavour not in FLAVOURS:
        raise EngineMismatchError(f"{made_by}, which is unknown; build it again: {command}")
    if module_of(plans.flavour) is None:
        others = [name for name in FLAVOURS if module_of(name) is not None]
        if others:
            raise EngineMismatchError(
                f"{made_by}, and {others[0]} is installed, which does not load them; install "
                f"{plans.flavour} ({_PACKAGES[plans.flavour]}), or build it again: {command}"
            )
        raise MissingDependencyError(
            f"{made_by}, which is not installed; install it: {_PACKAGES[plans.flavour]}"
        )
    try:
        module = import_flavour(plans.flavour)
    except (ImportError, OSError) as error:
        raise EngineMismatchError(
            f"{made_by}, whose libraries do not load here ({error}); install it again: "
            f"{_PACKAGES[plans.flavour]}"
        ) from error
    found = getattr(module, "__version__", "unknown")
    if found != plans.version:
        raise EngineMismatchError(
            f"{made_by} and {found} is installed, which does not load them; build it again: "
            f"{command}"
        )


def _require_gpu(plans: Plans, manifest: Manifest) -> None:
    major, minor = torch.cuda.get_device_capability(0)
    if (here := f"sm_{major}{minor}") in plans.gpus:
        return
    again = shlex.join(["slipstream", "build", manifest.source, "-o", "ENGINE"])
    raise EngineMismatchError(
        f"the engine's plans are for {', '.join(plans.gpus)} and this GPU "
        f"({torch.cuda.get_device_name(0)}) is {here}, which {plans.flavour} {plans.version} may "
        f"make none for; build one on our own kernels: {again} --target cuda"
    )
