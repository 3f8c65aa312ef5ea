"""NVIDIA GPUs through TensorRT: plans of what lies between attention, which runs on our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from slipstream.builder.engine import EngineLimits, Plans
from slipstream.builder.graph.describe import describe_format
from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.passes.fuse_parallel_linears import fuse_parallel_linears
from slipstream.builder.graph.passes.matrices import matrices
from slipstream.builder.graph.passes.quantize_fp8 import quantize_fp8_weights
from slipstream.builder.graph.prepare import Kernels, preparation
from slipstream.builder.graph.program import Program
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.base import check_choices
from slipstream.builder.targets.cpu.elementwise import lower_soft_cap
from slipstream.builder.targets.cuda import TARGET as CUDA
from slipstream.builder.targets.cuda.attention import use_row_major_keys
from slipstream.builder.targets.cuda.weights import StoreVectors
from slipstream.builder.targets.tensorrt.elementwise import SetTypes, cast_outputs, lower_gates
from slipstream.builder.targets.tensorrt.linear import (
    LowerEmbedding,
    LowerLinear,
    holds,
    rounds,
)
from slipstream.builder.targets.tensorrt.plans import make_plans
from slipstream.builder.targets.tensorrt.quantize import QuantizeProducts
from slipstream.builder.targets.tensorrt.segments import cut_segments
from slipstream.errors import BuildError
from slipstream.plugins.operators import DOMAIN

_LOWERED = ("Linear", "Embedding", "PagedAttention", "GatedActivation", "SoftCap")


@dataclass(frozen=True, slots=True)
class TensorRTTarget:
    """Lowering to plans, on the pages, the attention and the sampling of the ``cuda`` target."""

    name: str = "tensorrt"
    page_size: int = CUDA.page_size
    limits: EngineLimits = CUDA.limits
    group_size: int = CUDA.group_size

    def check(self, config: ModelConfig, options: BuildOptions) -> None:
        """Raise BuildError for heads or options that neither plans nor kernels take."""
        replace(CUDA, name=self.name).check(config, options)
        check_choices(self.name, options, {"tp_size": (1,)})
        if options.symmetric is False:
            raise BuildError(
                "target tensorrt has kernels for integers without zero points only; leave "
                "asymmetric out"
            )
        if options.quantization == "int8_wo" and options.group_size is not None:
            raise BuildError(
                f"group_size is {options.group_size}, but on target tensorrt 8-bit integers have a "
                "scale a row; leave it out, or use quantization int4_wo"
            )

    def kv_dtype(self, options: BuildOptions, dense: bool) -> str:
        """As on the ``cuda`` target."""
        return CUDA.kv_dtype(options, dense)

    def capability(self, program: Program, kv_dtype: str) -> str:
        """The oldest architecture that runs the engine."""
        types = {value.dtype for value in program.graph.initializers.values()}
        fp8 = kv_dtype == "float8_e4m3fn" or ir.DataType.FLOAT8E4M3FN in types
        return "sm_89" if fp8 else "sm_80"

    def plans(self, program: Program, limits: EngineLimits, directory: Path) -> Plans:
        """Make the plans of every function of the graph."""
        dtypes = {value.dtype for value in program.graph.initializers.values()}
        oldest = "sm_89" if ir.DataType.FLOAT8E4M3FN in dtypes else "sm_80"
        return make_plans(program.model, limits, oldest, directory)

    def pipeline(self, options: BuildOptions) -> Sequence[Pass]:
        """Prepare the weights, lower to standard operators of one type, cut at attention."""
        dtype = CUDA.dtype(options)
        kernels = Kernels(
            holds=(holds,),
            group_size=self.group_size,
            integers=(),
            rounds=rounds,
            rounding="not rounded",
            dtype=dtype,
        )
        return (
            check_runs,
            *self._quantization(options),
            *preparation(self.name, kernels, _unquantized(options)),
            fuse_parallel_linears,
            use_row_major_keys,
            cast_outputs,
            lower_gates,
            lower_soft_cap,
            LowerLinear(dtype),
            LowerEmbedding(dtype),
            StoreVectors(dtype),
            SetTypes(dtype),
            cut_segments,
        )

    def _quantization(self, options: BuildOptions) -> tuple[Pass, ...]:
        if options.quantization == "fp8":
            return (quantize_fp8_weights,)
        if options.bits is None:
            return ()
        return (QuantizeProducts(options.bits, options.group_size or self.group_size),)


def check_runs(program: Program) -> int:
    """BuildError for operators and weights that nothing in a plan computes."""
    for node in program.graph:
        if node.domain == DOMAIN and node.op_type not in _LOWERED:
            raise BuildError(
                f"the model has the operator {node.op_type}, which TensorRT has no kernel for, "
                "such as that of a mixture of experts; use --target cuda"
            )
    for tensor in matrices(program).values():
        if tensor.format.kind == "float4_e2m1":
            raise BuildError(
                f"{tensor.name} holds {describe_format(tensor.format)}, for which TensorRT's ONNX "
                "parser reaches no kernel that multiplies by 4-bit floats; use --target cuda"
            )
    return 0


def _unquantized(options: BuildOptions) -> BuildOptions:
    return replace(options, quantization="none", group_size=None, symmetric=None)


TARGET = TensorRTTarget()
