"""What the builder needs of a device kind, and the table of kinds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from slipstream.errors import BuildError
from slipstream.extensions import entry_points, load
from slipstream.plugins.cuda.detect import gpu_capability, gpu_works, sm

if TYPE_CHECKING:  # the table of kinds is also asked by those who build nothing
    from slipstream.builder.engine import EngineLimits, Plans
    from slipstream.builder.graph.passes import Pass
    from slipstream.builder.graph.program import Program
    from slipstream.builder.models.config import ModelConfig
    from slipstream.builder.options import BuildOptions

# Packages add to it by entry points of this group, whose names and values are of the same form.
GROUP, ATTRIBUTE = "slipstream.targets", "TARGET"
TARGETS = {
    "cpu": "slipstream.builder.targets.cpu",
    "cuda": "slipstream.builder.targets.cuda",
    "onnxruntime": "slipstream.builder.targets.onnxruntime",
    "tensorrt": "slipstream.builder.targets.tensorrt",
}


class Target(Protocol):
    """Lowers a canonical program to one device kind."""

    @property
    def name(self) -> str:
        """As the command line and the manifest spell it."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens of a KV page."""
        ...

    @property
    def limits(self) -> EngineLimits:
        """What an engine is built for when nobody says."""
        ...

    def check(self, config: ModelConfig, options: BuildOptions) -> None:
        """Raise BuildError for a model or options that its kernels cannot run."""
        ...

    def capability(self, program: Program, kv_dtype: str) -> str:
        """The oldest device that runs a lowered program, such as ``sm_80``; ``any`` when all
        do."""
        ...

    def kv_dtype(self, options: BuildOptions, dense: bool) -> str:
        """The dtype of KV pages; ``dense`` says that no weight is quantized."""
        ...

    def pipeline(self, options: BuildOptions) -> Sequence[Pass]:
        """Passes from the canonical program to one whose every weight is stored; the limits of
        ``options`` are those of the engine."""
        ...


@runtime_checkable
class PlanningTarget(Protocol):
    """A target on which another compiler makes the code of what a graph calls."""

    def plans(self, program: Program, limits: EngineLimits, directory: Path) -> Plans:
        """Write the plans of a program whose graph and weights lie in a directory.

        BuildError for what that compiler refuses, MissingDependencyError where there is none.
        """
        ...


def check_heads(target: str, config: ModelConfig, most: int) -> None:
    """Raise BuildError for heads that no attention kernel of ``target`` takes: other than a
    multiple of 8 of at most ``most`` elements."""
    from slipstream.builder.models import architecture_of

    in_layer = architecture_of(config.architecture).in_layer
    for head_dim in sorted({in_layer(config, i).head_dim for i in range(config.num_layers)}):
        if head_dim % 8 or head_dim > most:
            raise BuildError(
                f"the model has heads of {head_dim} elements; the {target} target runs those of "
                f"a multiple of 8 up to {most}: choose another model, or another target"
            )


def check_choices(
    target: str, options: BuildOptions, choices: Mapping[str, Collection[object]]
) -> None:
    """Raise BuildError for an option whose value is not among those of ``target``."""
    for name, known in choices.items():
        if (value := getattr(options, name)) not in known:
            raise BuildError(
                f"{name} {value} does not run on target {target}; use one of "
                f"{', '.join(map(str, known))}"
            )


def create_target(name: str) -> Target:
    """The target called ``name``, or the best one this machine has for ``auto``."""
    if name == "auto":
        name = "cuda" if gpu_works() else "cpu"
    known = known_targets()
    if name not in known:
        raise BuildError(f"target {name!r} is unknown; known targets: auto, {', '.join(known)}")
    target: Target = load(known[name], ATTRIBUTE, GROUP)
    return target


def check_runs_here(target: str, capability: str) -> None:
    """Raise BuildError where ``auto`` would make an engine that this machine's GPU is too old
    for."""
    here = gpu_capability()
    if target != "auto" or here is None or not capability.startswith("sm_"):
        return
    if int(capability.removeprefix("sm_")) > int(sm(here).removeprefix("sm_")):
        raise BuildError(
            f"the engine needs a GPU of {capability} or newer, for float8, and this one is "
            f"{sm(here)}; leave out the fp8, use --target cpu, or use --target cuda to build for "
            "another machine"
        )


def known_targets() -> dict[str, str]:
    """The table, and what installed packages add to it: name -> the place of the declaration."""
    return {**entry_points(GROUP), **TARGETS}
