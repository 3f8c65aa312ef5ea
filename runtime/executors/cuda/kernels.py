"""Compiles the kernels of an engine before there is anything to run, and keeps them in it."""

from __future__ import annotations

import logging

import onnx_ir as ir

from slipstream.builder.contract import TARGET_GRAPH
from slipstream.builder.engine import KERNELS, TACTICS, WEIGHTS, Engine
from slipstream.plugins.cuda.kernel_store import pack_kernels
from slipstream.plugins.cuda.precompile import (
    Specialization,
    compile_kernels,
    compiled_kernels,
    record,
    standing_in,
)
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.cuda.device import Device, Work
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.weights import load_weights

log = logging.getLogger(__name__)


def keep_kernels(engine: Engine, config: RuntimeConfig, capability: tuple[int, int]) -> int:
    """Compile every kernel that steps of an engine launch on a GPU of this compute capability,
    which need not be there, into the engine's file of kernels.

    Returns how many those are. Raises EngineMismatchError for a graph that no GPU runs.
    """
    kernels = _launched(engine, config, capability)
    compile_kernels(kernels, capability)
    compiled = list(compiled_kernels(kernels, capability))
    engine.write_file(KERNELS, pack_kernels(compiled))
    return len(compiled)


def _launched(
    engine: Engine, config: RuntimeConfig, capability: tuple[int, int]
) -> list[Specialization]:
    manifest = engine.manifest
    graph = ir.load(engine.path / manifest.graphs[TARGET_GRAPH].file).graph
    with standing_in(capability):
        device = Device(capability)
        weights = load_weights(engine.path / WEIGHTS, device)
        executor = CUDAExecutor.from_weights(
            manifest, config, graph, weights, engine.path / TACTICS, device
        )
        with device.work():
            return record([_as_far_as_it_goes(work) for work in executor.works()])


def _as_far_as_it_goes(work: Work) -> Work:
    """What needs a GPU that is there leaves the rest of its kernels to the start."""

    def attempt() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - of any library beneath
            log.info("some kernels cannot be compiled before the start: %s", str(error)[:200])

    return attempt
