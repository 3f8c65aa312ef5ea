"""Runs an engine of the ``tensorrt`` target: the CUDA executor with plans between attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from slipstream.builder.contract import TARGET_GRAPH
from slipstream.builder.engine import TACTICS, WEIGHTS, Engine
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.cuda.device import Device, Work
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.weights import load_weights
from slipstream.runtime.executors.tensorrt.calls import Segment, bindings, drop_constants
from slipstream.runtime.executors.tensorrt.plans import load_plans

# Loads what computes the calls of an engine's graph, by the name of its node.
Loader = Callable[[Engine, ir.Model, Device], Mapping[str, Segment]]


class UncapturedDevice(Device):
    """A GPU whose steps are launched one plan after another: TensorRT leaves open what becomes of a
    captured graph once its contexts have been given other sizes."""

    def capture(self, work: Work) -> Work:
        """``work`` itself, run once so that its kernels are compiled."""
        with self.work():
            work()
        return work


class TensorRTExecutor(CUDAExecutor):
    """The ``Executor`` of an NVIDIA GPU whose linears, norms and gates are plans.

    Pages, attention, sampling and the order of steps are those of the CUDA executor. Plans of the
    head take as many rows as there are sequences, so no drafts are verified.
    """

    max_drafts = 0

    def __init__(self, engine: Engine, config: RuntimeConfig, load: Loader = load_plans) -> None:
        """Put an engine's weights and plans on the GPU; ``load`` is another for tests.

        The machine has been checked (``require``). Raises CapacityError when weights or buffers do
        not fit, EngineMismatchError for plans that do not load.
        """
        self._device = UncapturedDevice()
        manifest = engine.manifest
        model = ir.load(engine.path / manifest.graphs[TARGET_GRAPH].file)
        with self._device.work():
            segments = load(engine, model, self._device)
        graph = model.graph
        drop_constants(graph)
        self._calls = bindings(graph, segments)
        weights = load_weights(engine.path / WEIGHTS, self._device, graph.initializers)
        self._start(manifest, config, (graph, None), weights, engine.path / TACTICS)
