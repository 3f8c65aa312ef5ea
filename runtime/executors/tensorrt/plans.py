"""Plans on a GPU, by the API that both flavours of TensorRT have.

Nobody has run this module: there was no GPU that these plans are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.engine import CONSTANT, Engine
from slipstream.errors import EngineMismatchError, ExecutionError
from slipstream.plugins.cuda.tensorrt import import_flavour
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.tensorrt.calls import Segment
from slipstream.runtime.executors.tensorrt.require import plans_of

_ALIGNMENT = 256  # of the memory that TensorRT works in


def load_plans(engine: Engine, model: ir.Model, device: Device) -> dict[str, Segment]:
    """The plan of every call of an engine's graph, by the name of its node.

    All work in one piece of memory, because they run one after another. EngineMismatchError for a
    plan that TensorRT does not load.
    """
    plans = plans_of(engine.manifest)
    trt = import_flavour(plans.flavour)
    assert trt is not None, plans.flavour
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    functions = {function.name: function for function in model.functions.values()}
    of = {plans.calls[n.name]: functions[n.op_type] for n in model.graph if n.name in plans.calls}
    loaded = {file: _load(runtime, engine.path / file, engine) for file in of}
    size = max(plan.device_memory_size_v2 for plan in loaded.values())
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device.torch)
    made = {file: PlanRunner(trt, plan, of[file], memory) for file, plan in loaded.items()}
    return {call: made[file] for call, file in plans.calls.items()}


def _load(runtime: Any, file: Path, engine: Engine) -> Any:  # noqa: ANN401 - of two packages
    plan = runtime.deserialize_cuda_engine(file.read_bytes())
    if plan is None:
        raise EngineMismatchError(
            f"TensorRT does not load {file.name} of the engine {engine.path}; build it again: "
            f"{engine.manifest.command}"
        )
    return plan


class PlanRunner:
    """The plan of a ``function``, with a context for each of its ranges of sizes; all work in
    ``memory``."""

    def __init__(
        self,
        trt: Any,  # noqa: ANN401
        plan: Any,  # noqa: ANN401
        function: ir.Function,
        memory: Tensor,
    ) -> None:
        names = [str(value.name) for value in function.inputs]
        self._plan, self._memory = plan, memory
        self._inputs = [name for name in names if not name.endswith(CONSTANT)]
        self._outputs = [str(value.name) for value in function.outputs]
        self._sized = [name for name in self._inputs if -1 in tuple(plan.get_tensor_shape(name))]
        greatest = [
            plan.get_tensor_profile_shape(self._sized[0], profile)[2]
            for profile in range(plan.num_optimization_profiles)
        ]
        self._most = [next(iter(shape)) for shape in greatest]
        self._contexts = [self._context(trt, profile) for profile in range(len(self._most))]
        self._rows = [0] * len(self._most)

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Enqueue the plan on the current stream."""
        given = dict(zip(self._inputs, inputs, strict=True))
        rows = len(given[self._sized[0]])
        profile = next(index for index, most in enumerate(self._most) if rows <= most)
        context = self._contexts[profile]
        if rows != self._rows[profile]:
            for name in self._sized:
                context.set_input_shape(name, tuple(given[name].shape))
            self._rows[profile] = rows
        for name, tensor in (*given.items(), *zip(self._outputs, outputs, strict=True)):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExecutionError(f"TensorRT did not run its plan for {rows} rows")

    def _context(self, trt: Any, profile: int) -> Any:  # noqa: ANN401
        by_hand = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._plan.create_execution_context(by_hand)
        stream = torch.cuda.current_stream()
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        stream.synchronize()
        start = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        context.set_device_memory(start, self._plan.device_memory_size_v2)
        return context
