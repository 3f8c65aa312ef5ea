"""The compiled kernels that ``slipstream build`` keeps in an engine for NVIDIA GPUs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slipstream.builder.contract import HEAD_GRAPH, TARGET_GRAPH
from slipstream.builder.engine import KERNELS, TACTICS, WEIGHTS, Engine, Manifest
from slipstream.builder.targets.base import create_target
from slipstream.plugins.cuda import detect
from slipstream.server.engine_summary import read_graph
from slipstream.weights.safetensors import ArraySpec, read_header

if TYPE_CHECKING:
    import onnx_ir as ir

    from slipstream.builder.build import Plan
    from slipstream.builder.options import BuildOptions

log = logging.getLogger(__name__)
_SM = re.compile(r"sm_(\d+)(\d)")


def kernel_capability(kernels: str, options: BuildOptions) -> tuple[int, int] | None:
    """The compute capability of the GPU that the option ``--kernels`` names; None for no kernels.

    Raises click.UsageError for one that nothing can be compiled for.
    """
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if kernels in ("auto", "none"):
        return detect.gpu_capability() if kernels == "auto" and not missing else None
    if (named := _SM.fullmatch(kernels)) is None:
        raise click.UsageError(f"--kernels is {kernels!r}; use auto, none or a GPU such as sm_90")
    if (target := create_target(options.target).name) != "cuda":
        raise click.UsageError(f"--kernels is for target cuda and the target is {target}")
    if missing:
        raise click.UsageError(f"--kernels needs {missing[0]}: pip install 'slipstream[cuda]'")
    return int(named[1]), int(named[2])


def compile_plan(plan: Plan, capability: tuple[int, int]) -> bytes | None:
    """The file of kernels of an engine that is being built; None if no such GPU runs it."""
    from slipstream.builder.build import manifest_of

    parts = [part for weight in plan.weights for part in weight.parts]
    graphs = {name: program.graph for name, program in plan.programs.items()}
    return _compile(manifest_of(plan, {}, "", ""), graphs, parts, capability)


def compile_again(engine: Engine, capability: tuple[int, int]) -> None:
    """Replace the kernels of an engine by those that its tactics now choose."""
    tensors = read_header(engine.path / WEIGHTS).values()
    parts = [ArraySpec(tensor.name, tensor.numpy_dtype(), tensor.shape) for tensor in tensors]
    tactics = engine.path / TACTICS
    graphs = {name: read_graph(engine, name) for name in engine.manifest.graphs}
    kernels = _compile(engine.manifest, graphs, parts, capability, tactics)
    if kernels is not None:
        engine.write_file(KERNELS, kernels)


def _compile(
    manifest: Manifest,
    graphs: Mapping[str, ir.Graph],
    parts: Sequence[ArraySpec],
    capability: tuple[int, int],
    tactics: Path | None = None,
) -> bytes | None:
    if manifest.target != "cuda" or capability < _oldest(manifest):
        return None
    from slipstream.runtime.executors.cuda.kernels import kernel_file

    try:
        graph, head = graphs[TARGET_GRAPH], graphs.get(HEAD_GRAPH)
        return kernel_file(manifest, graph, parts, capability, tactics, head)
    except Exception as error:  # noqa: BLE001 - the engine is whole without
        log.warning("the engine keeps no kernels: %s", error)
        return None


def _oldest(manifest: Manifest) -> tuple[int, int]:
    named = _SM.fullmatch(manifest.capability)
    assert named is not None, manifest.capability
    return int(named[1]), int(named[2])
