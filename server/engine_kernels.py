"""The compiled kernels that ``slipstream build`` keeps in an engine for NVIDIA GPUs."""

from __future__ import annotations

import logging
import pickle
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from slipstream.builder.contract import HEAD_GRAPH, TARGET_GRAPH
from slipstream.builder.engine import KERNELS, TACTICS, WEIGHTS, Engine
from slipstream.builder.targets.base import create_target
from slipstream.plugins.cuda import detect
from slipstream.server.engine_summary import read_graph
from slipstream.weights.safetensors import ArraySpec, read_header

if TYPE_CHECKING:
    from slipstream.builder.build import Plan
    from slipstream.builder.options import BuildOptions

log = logging.getLogger(__name__)
_SM = re.compile(r"sm_(\d+)(\d)")
_PROCESS = [sys.executable, "-P", "-m", "slipstream.server.kernel_process"]


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


def compile_aside(plan: Plan, capability: tuple[int, int]) -> bytes | None:
    """The file of kernels of an engine that is being built; None if no such GPU runs it, or if that
    fails, which is logged.

    Another process makes it, which plans the same engine: what this takes of the interpreter, the
    import of torch before all, would hold up the weights.
    """
    if plan.target != "cuda" or capability < _oldest(plan.capability):
        return None
    asked = pickle.dumps((plan.checkpoint.path, plan.options, capability))
    try:
        done = subprocess.run(_PROCESS, input=asked, capture_output=True, check=False)
    except OSError as error:
        log.warning("the engine keeps no kernels: %s", error)
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        log.warning("the engine keeps no kernels: %s", said[-1] if said else done.returncode)
        return None
    for line in said:
        log.info("the process of kernels: %s", line)
    return done.stdout


def compile_plan(plan: Plan, capability: tuple[int, int]) -> bytes:
    """That file, made in this process, which has no other threads and is forked."""
    from slipstream.builder.build import manifest_of
    from slipstream.plugins.cuda.precompile import compile_in_forks
    from slipstream.runtime.executors.cuda.kernels import kernel_file

    parts = [part for weight in plan.weights for part in weight.parts]
    manifest = manifest_of(plan, {}, "", "")
    head = None if plan.head_program is None else plan.head_program.graph
    graph = plan.program.graph
    return kernel_file(manifest, graph, parts, capability, head=head, compile_all=compile_in_forks)


def compile_again(engine: Engine, capability: tuple[int, int]) -> None:
    """Replace the kernels of an engine by those that its tactics now choose."""
    tensors = read_header(engine.path / WEIGHTS).values()
    parts = [ArraySpec(tensor.name, tensor.numpy_dtype(), tensor.shape) for tensor in tensors]
    if engine.manifest.target != "cuda" or capability < _oldest(engine.manifest.capability):
        return
    from slipstream.runtime.executors.cuda.kernels import kernel_file

    tactics = engine.path / TACTICS
    try:
        graphs = {name: read_graph(engine, name) for name in engine.manifest.graphs}
        graph, head = graphs[TARGET_GRAPH], graphs.get(HEAD_GRAPH)
        kernels = kernel_file(engine.manifest, graph, parts, capability, tactics, head)
    except Exception as error:  # noqa: BLE001 - the engine is whole without
        log.warning("the engine keeps no kernels: %s", error)
        return
    engine.write_file(KERNELS, kernels)


def _oldest(capability: str) -> tuple[int, int]:
    named = _SM.fullmatch(capability)
    assert named is not None, capability
    return int(named[1]), int(named[2])
