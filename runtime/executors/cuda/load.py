"""Begins to copy an engine's weights to the GPU, and imports the executor meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from slipstream.builder.engine import KERNELS, Engine, weight_file
from slipstream.phases import phase
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.weights import load_weights

if TYPE_CHECKING:
    from slipstream.runtime.config import RuntimeConfig
    from slipstream.runtime.executors.cuda.executor import CUDAExecutor


@dataclass(frozen=True, slots=True)
class Loading:
    """What is on its way: weights to the ``device``, and Triton to where it takes kernels from."""

    device: Device
    weights: Future[dict[str, Tensor]]
    prepared: Future[None]


def begin_loading(engine: Engine, rank: int = 0) -> Loading:
    """Start both, in threads, for a ``rank`` on its own GPU; what they raise comes from the
    results."""
    with phase("device"):
        device = Device(index=rank)
    pool = ThreadPoolExecutor(2, "slipstream-load", initializer=device.use)
    weights = pool.submit(_weights, engine.path / weight_file(rank), device)
    prepared = pool.submit(_prepare, engine.path / KERNELS, device)
    pool.shutdown(wait=False)  # its threads end with these two
    return Loading(device, weights, prepared)


def load_executor(engine: Engine, config: RuntimeConfig) -> CUDAExecutor:
    """The executor of an engine, as ``CUDAExecutor`` makes it."""
    loading = begin_loading(engine)
    with phase("import of the executor"):
        from slipstream.runtime.executors.cuda.executor import CUDAExecutor

    return CUDAExecutor(engine, config, loading=loading)


def _weights(file: Path, device: Device) -> dict[str, Tensor]:
    with phase("weights"):
        return load_weights(file, device)


def _prepare(kernels: Path, device: Device) -> None:
    with phase("file of kernels, and Triton's own start"):
        device.prepare(kernels)
