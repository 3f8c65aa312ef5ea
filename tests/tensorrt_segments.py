"""Stands in for TensorRT: what plans are made of, computed by ONNX's reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from slipstream.builder.engine import PLANS, Engine, EngineLimits, Plans
from slipstream.builder.graph.program import IR_VERSION
from slipstream.builder.targets import tensorrt
from slipstream.builder.targets.tensorrt.plans import (
    UNVERIFIED,
    PlanSource,
    plan_sources,
    write_model,
)
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.tensorrt.calls import Segment

VERSION = "1.7.1.116"


def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds write empty plans, as if TensorRT had made them."""
    monkeypatch.setattr(tensorrt, "make_plans", empty_plans)


def empty_plans(model: ir.Model, limits: EngineLimits, capability: str, directory: Path) -> Plans:
    """Plans that nothing loads."""
    calls = {name: source.file for name, source in plan_sources(model).items()}
    for file in calls.values():
        (directory / file).write_bytes(b"")
    (directory / PLANS).write_text("{}")
    return Plans("tensorrt_rtx", VERSION, ("sm_89", "sm_120"), calls, UNVERIFIED)


def evaluated(engine: Engine, model: ir.Model, device: Device) -> Mapping[str, Segment]:
    """A loader whose segments are the functions themselves."""
    return {name: evaluator(source, engine.path) for name, source in plan_sources(model).items()}


def run_function(function: ir.Function, arguments: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs of a function, all of whose arguments are given."""
    model = ir.to_proto(ir.Model(function.graph.clone(), ir_version=IR_VERSION))
    names = [str(value.name) for value in function.inputs]
    session = ReferenceEvaluator(model, new_ops=[MatMul])
    return list(session.run(None, dict(zip(names, arguments, strict=True))))


def evaluator(source: PlanSource, directory: Path) -> Segment:
    """Computes a call on tensors of a CPU."""
    file = directory / f".{source.file}.onnx"
    write_model(source, file)
    model = onnx.load(file)
    file.unlink()
    session = ReferenceEvaluator(model, new_ops=[MatMul])
    names = [value.name for value in model.graph.input]

    def segment(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        given = dict(zip(names, map(to_numpy, inputs), strict=True))
        for tensor, array in zip(outputs, session.run(None, given), strict=True):
            tensor.copy_(to_torch(np.asarray(array)))

    return segment


class MatMul(OpRun):
    """Sums in float32, as a GPU does; NumPy's own products of 16-bit numbers take seconds."""

    op_domain = ""

    def _run(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any]]:
        return ((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype),)


_BITS: Mapping[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same numbers, of types that NumPy does not know too."""
    if tensor.dtype not in _BITS:
        return tensor.numpy()
    bits, dtype = _BITS[tensor.dtype]
    return tensor.view(bits).numpy().view(dtype)


def to_torch(array: NDArray[Any]) -> Tensor:
    """The same numbers."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
