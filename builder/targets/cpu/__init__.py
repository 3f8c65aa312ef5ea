"""The CPU: one ONNX Runtime session, with this package's native operators where they are faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.builder.engine import EngineLimits
from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.passes.fuse_add_rms_norm import fuse_add_rms_norm
from slipstream.builder.graph.passes.fuse_gate import fuse_gate
from slipstream.builder.graph.passes.fuse_norm import fuse_norm
from slipstream.builder.graph.passes.fuse_parallel_linears import fuse_parallel_linears
from slipstream.builder.graph.passes.fuse_residual import fuse_residual
from slipstream.builder.graph.passes.rewrite import Holds
from slipstream.builder.graph.prepare import Kernels, preparation
from slipstream.builder.graph.program import Program
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.base import check_choices, check_heads
from slipstream.builder.targets.cpu.dense import (
    SetDenseType,
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
from slipstream.builder.targets.cpu.experts import lower_expert_linear
from slipstream.builder.targets.cpu.matmul_nbits import can_lower, lower_matmul_nbits
from slipstream.builder.targets.cpu.packed import pack_embedding, pack_linear
from slipstream.builder.targets.cpu.top_token import add_top_tokens
from slipstream.errors import BuildError
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.weights.tensor import WeightFormat

_LIMITS = EngineLimits()
_LARGEST_HEAD = 512  # elements
_CHOICES = {
    "quantization": ("none", "int8_wo", "int4_wo"),
    "kv_cache_dtype": ("auto", "float32", "float16", "int8", "fp8", "k16v8"),
    "ort_attention": ("auto",),
    "ort_activations": ("exact",),
}
_ACTIVATIONS = "to int8 in blocks of 32, each by its own range"
_LINEARS: tuple[Pass, ...] = (
    fuse_gate,
    fuse_residual,
    fuse_norm,
    pack_linear,
    pack_embedding,
    lower_matmul_nbits,
    lower_dense_linear,
    lower_dense_embedding,
)
_ONNXRUNTIME_LINEARS: tuple[Pass, ...] = (
    lower_matmul_nbits,
    lower_dense_linear,
    lower_dense_embedding,
    pack_embedding,
)
_LOWER: tuple[Pass, ...] = (
    fuse_add_rms_norm,
    lower_expert_linear,
    lower_add_rms_norm,
    lower_rms_norm,
    lower_gated_activation,
    lower_soft_cap,
    store_dense_weights,
    add_top_tokens,
)


@dataclass(frozen=True, slots=True)
class CPUTarget:
    """Lowering to ONNX Runtime on a CPU."""

    name: str = "cpu"
    # 32 tokens fill two AVX-512 registers of scores and waste at most 31 slots a sequence.
    page_size: int = 32
    limits: EngineLimits = _LIMITS
    group_size: int = 32

    def check(self, config: ModelConfig, options: BuildOptions) -> None:
        """PagedAttention works on vectors of 8 lanes and keeps a head in its scratch memory."""
        check_heads(self.name, config, _LARGEST_HEAD)
        check_choices(self.name, options, _CHOICES)
        if options.gemm_plugin == "disable" and options.dtype not in ("auto", "float32"):
            raise BuildError(
                f"dtype {options.dtype} does not run on ONNX Runtime's kernels, whose weights are "
                "float32; leave it out, or leave out gemm_plugin disable"
            )

    def capability(self, program: Program, kv_dtype: str) -> str:
        """Kernels for every instruction set are in the library."""
        return "any"

    def kv_dtype(self, options: BuildOptions, dense: bool) -> str:
        """As asked; ``auto`` keeps a dense engine exact and halves the pages of a quantized one."""
        if options.kv_cache_dtype != "auto":
            return "float8_e4m3fn" if options.kv_cache_dtype == "fp8" else options.kv_cache_dtype
        return "float32" if dense else "float16"

    def pipeline(self, options: BuildOptions) -> Sequence[Pass]:
        """Prepare the weights, fuse, then lower what is left to ONNX Runtime's operators."""
        ours = options.gemm_plugin == "auto"
        holds: tuple[Holds, ...] = (can_pack, can_lower) if ours else (can_lower,)
        kernels = Kernels(
            holds=holds,
            group_size=self.group_size,
            integers=("float8_e4m3", "float4_e2m1", "codebook"),
            rounds=_never,
            rounding=_ACTIVATIONS,
            dtype="float32",
            fold_norms=True,
        )
        return (
            *preparation(self.name, kernels, options),
            SetDenseType(options.dtype),
            fuse_parallel_linears,
            *(_LINEARS if ours else _ONNXRUNTIME_LINEARS),
            *_LOWER,
        )


def _never(fmt: WeightFormat) -> bool:
    """The kernels have one way of rounding x."""
    return False


TARGET = CPUTarget()
