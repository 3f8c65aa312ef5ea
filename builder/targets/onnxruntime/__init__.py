"""ONNX Runtime without operators of ours: one graph in standard and ``com.microsoft`` operators,
for its CUDA and its CPU provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from slipstream.builder.engine import EngineLimits
from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.passes.fuse_add_rms_norm import fuse_add_rms_norm
from slipstream.builder.graph.passes.fuse_parallel_linears import fuse_parallel_linears
from slipstream.builder.graph.passes.fuse_rotary import fuse_rotary
from slipstream.builder.graph.prepare import Kernels, preparation
from slipstream.builder.graph.program import Program
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.base import check_choices
from slipstream.builder.targets.cpu.dense import (
    lower_dense_embedding,
    lower_dense_linear,
    store_dense_weights,
)
from slipstream.builder.targets.cpu.elementwise import (
    lower_add_rms_norm,
    lower_gated_activation,
    lower_rms_norm,
    lower_soft_cap,
)
from slipstream.builder.targets.cpu.matmul_nbits import can_lower, lower_matmul_nbits
from slipstream.builder.targets.onnxruntime.finish import (
    add_top_tokens,
    part_biases,
    refuse_unlowered,
    widen_output,
)
from slipstream.builder.targets.onnxruntime.pages import UsePages
from slipstream.builder.targets.onnxruntime.precision import SetPrecision
from slipstream.builder.targets.onnxruntime.slots import UseSlots
from slipstream.errors import BuildError
from slipstream.weights.tensor import WeightFormat

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
_LIMITS = EngineLimits(max_num_tokens=2048)
_CHOICES = {
    "quantization": ("none", "int8_wo", "int4_wo"),
    "kv_cache_dtype": ("auto",),
    "gemm_plugin": ("auto",),
    "tp_size": (1,),
}
_ROUNDING = {"exact": "not rounded", "int8": "rounded to int8 in blocks"}
# What MatMulNBits multiplies in: the type of x, or int8, which the CPU provider has; from float16
# that of 1.32 makes garbage.
_ACCURACY_LEVEL = {"exact": 0, "int8": 4}


@dataclass(frozen=True, slots=True)
class ONNXRuntimeTarget:
    """Lowering to what every onnxruntime has."""

    name: str = "onnxruntime"
    # The least that every release of PagedAttention takes.
    page_size: int = 256
    limits: EngineLimits = _LIMITS
    group_size: int = 32

    def check(self, config: ModelConfig, options: BuildOptions) -> None:
        """Raise BuildError for options that its operators do not take; models are refused by the
        operator that cannot be lowered."""
        check_choices(self.name, options, _CHOICES)
        if options.ort_attention == "pages" and self.dtype(options) == "float32":
            raise BuildError(
                "ort_attention pages is PagedAttention of onnxruntime's CUDA provider, which takes "
                "float16 and bfloat16, and dtype is float32; use ort_attention slots, or another "
                "dtype"
            )
        if options.ort_activations == "int8" and self.dtype(options) != "float32":
            raise BuildError(
                "ort_activations int8 is for onnxruntime's CPU provider, which rounds x in float32 "
                f"only, and dtype is {self.dtype(options)}; use dtype float32, or leave it out"
            )

    def dtype(self, options: BuildOptions) -> str:
        """The type of activations, of the KV cache and of weights that are not quantized: float16
        unless asked, the one that both providers have attention for."""
        return "float16" if options.dtype == "auto" else options.dtype

    def kv_dtype(self, options: BuildOptions, dense: bool) -> str:
        """That of the activations."""
        return self.dtype(options)

    def capability(self, program: Program, kv_dtype: str) -> str:
        """The execution provider that has all kernels; ``any`` where CPU and CUDA do."""
        if kv_dtype == "float32":
            return CPU_PROVIDER
        pages = bool(program.nodes("PagedAttention"))
        return CUDA_PROVIDER if pages or kv_dtype == "bfloat16" else "any"

    def pipeline(self, options: BuildOptions) -> Sequence[Pass]:
        """Prepare the weights, fuse what ONNX Runtime has fused operators for, lower the rest, and
        say at last in which type everything is."""
        assert options.max_seq_len is not None
        kernels = Kernels(
            holds=(can_lower,),
            group_size=self.group_size,
            integers=("float8_e4m3", "float4_e2m1", "codebook"),
            rounds=_never,
            rounding=_ROUNDING[options.ort_activations],
            dtype="float32",
            fold_norms=True,
        )
        slots = options.ort_attention != "pages"
        return (
            *preparation(self.name, kernels, options),
            fuse_parallel_linears,
            part_biases,
            partial(lower_matmul_nbits, accuracy_level=_ACCURACY_LEVEL[options.ort_activations]),
            lower_dense_linear,
            partial(lower_dense_embedding, held=_never),
            fuse_add_rms_norm,
            fuse_rotary,
            UseSlots(options.max_seq_len) if slots else UsePages(options.max_seq_len),
            lower_add_rms_norm,
            lower_rms_norm,
            partial(lower_gated_activation, portable=True),
            widen_output,
            lower_soft_cap,
            refuse_unlowered,
            store_dense_weights,
            add_top_tokens,
            SetPrecision(self.dtype(options)),
        )


def _never(fmt: WeightFormat) -> bool:
    """No kernel rounds x as a checkpoint says, and none looks up quantized rows."""
    return False


TARGET = ONNXRuntimeTarget()
