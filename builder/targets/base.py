"""What the builder needs of a device kind, and the table of kinds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from slipstream.builder.engine import EngineLimits
from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.program import Program
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.plugins.cuda.detect import has_gpu

TARGETS = {"cpu": "slipstream.builder.targets.cpu", "cuda": "slipstream.builder.targets.cuda"}


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
        """Passes from the canonical program to one whose every weight is stored."""
        ...


def create_target(name: str) -> Target:
    """The target called ``name``, or the best one this machine has for ``auto``."""
    if name == "auto":
        name = "cuda" if has_gpu() else "cpu"
    if name not in TARGETS:
        raise BuildError(f"target {name!r} is unknown; known targets: auto, {', '.join(TARGETS)}")
    target: Target = import_module(TARGETS[name]).TARGET
    return target
