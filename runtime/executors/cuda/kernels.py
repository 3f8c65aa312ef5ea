"""Compiles the kernels of an engine before there is anything to run, for its file of kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.contract import EAGLE3, page_size_of
from slipstream.builder.engine import Manifest
from slipstream.phases import phase
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
from slipstream.weights.safetensors import ArraySpec

log = logging.getLogger(__name__)
Compiler = Callable[[Sequence[Specialization], tuple[int, int]], None]


def kernel_file(
    manifest: Manifest,
    graph: ir.Graph,
    weights: Iterable[ArraySpec],
    capability: tuple[int, int],
    tactics: Path | None = None,
    head: ir.Graph | None = None,
    *,
    compile_all: Compiler = compile_kernels,
) -> bytes:
    """Every kernel that steps of an engine launch on a GPU of this compute capability, which need
    not be there, compiled, as the content of its file of kernels.

    ``compile_all`` puts them into Triton's cache. Raises EngineMismatchError for a graph that no
    GPU runs.
    """
    with phase("finding the kernels"):
        kernels = launched_kernels(manifest, graph, weights, capability, tactics, head)
    with phase(f"compiling {len(kernels)} kernels"):
        compile_all(kernels, capability)
    with phase("packing them"):
        return pack_kernels(compiled_kernels(kernels, capability))


def launched_kernels(
    manifest: Manifest,
    graph: ir.Graph,
    weights: Iterable[ArraySpec],
    capability: tuple[int, int],
    tactics: Path | None = None,
    head: ir.Graph | None = None,
) -> list[Specialization]:
    """Those kernels, not yet compiled: of steps without drafts, and with those of the ``head`` or
    of anyone else."""
    limits = asdict(manifest.limits)
    config = RuntimeConfig(**limits, page_size=page_size_of(manifest.caches))
    drafts = replace(config, speculative=EAGLE3 if head is not None else "ngram")
    found: dict[str, Specialization] = {}
    with standing_in(capability):
        device = Device(capability)
        planned = {part.name: _planned(part, device) for part in weights}
        for each in (config, drafts) if manifest.pooling is None else (config,):
            executor = CUDAExecutor.from_weights(
                manifest, each, graph, planned, tactics, device, head
            )
            with device.work():
                launched = record([_as_far_as_it_goes(work) for work in executor.works()])
            found |= {repr(kernel): kernel for kernel in launched}
    return list(found.values())


def _planned(part: ArraySpec, device: Device) -> Tensor:
    dtype: torch.dtype = getattr(torch, part.dtype.name)
    return torch.empty(part.shape, dtype=dtype, device=device.torch)


def _as_far_as_it_goes(work: Work) -> Work:
    """What needs a GPU that is there leaves the rest of its kernels to the start."""

    def attempt() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - of any library beneath
            log.info("some kernels cannot be compiled before the start: %s", str(error)[:200])

    return attempt
