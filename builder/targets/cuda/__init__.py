"""NVIDIA GPUs: our own executor runs the lowered graph on this package's kernels and cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from slipstream.builder.engine import EngineLimits
from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.passes.fuse_add_rms_norm import fuse_add_rms_norm
from slipstream.builder.graph.passes.fuse_all_reduce import fuse_all_reduce
from slipstream.builder.graph.passes.fuse_embedding_shard import fuse_embedding_shard
from slipstream.builder.graph.passes.fuse_gate import fuse_gate
from slipstream.builder.graph.passes.fuse_norm import fuse_norm
from slipstream.builder.graph.passes.fuse_parallel_linears import fuse_parallel_linears
from slipstream.builder.graph.passes.fuse_residual import fuse_residual
from slipstream.builder.graph.passes.fuse_rotary import fuse_rotary
from slipstream.builder.graph.passes.fuse_router import fuse_router
from slipstream.builder.graph.prepare import Kernels, preparation
from slipstream.builder.graph.program import Program
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.base import check_choices, check_heads
from slipstream.builder.targets.cuda.attention import use_row_major_keys
from slipstream.builder.targets.cuda.weights import PackWeights, SetPrecision, StoreVectors
from slipstream.errors import BuildError
from slipstream.plugins.linear import WEIGHT_TYPES
from slipstream.plugins.linear.cuda.packing import can_pack
from slipstream.plugins.linear.cuda.tactics import whole_rows
from slipstream.weights.tensor import WeightFormat

_LARGEST_HEAD = 512  # elements
_LIMITS = EngineLimits(max_batch_size=1024, max_num_tokens=8192)
_KV_DTYPES = {"auto": None, "bfloat16": "bfloat16", "float16": "float16", "fp8": "float8_e4m3fn"}
_CHOICES: dict[str, tuple[object, ...]] = {
    "kv_cache_dtype": tuple(_KV_DTYPES),
    "dtype": ("auto", "bfloat16", "float16"),
    "ort_attention": ("auto",),
    "ort_activations": ("exact",),
}


@dataclass(frozen=True, slots=True)
class CUDATarget:
    """Lowering to the CUDA kernels of ``plugins/``."""

    name: str = "cuda"
    # A page and head of 64 tokens is one tile of an attention kernel.
    page_size: int = 64
    limits: EngineLimits = _LIMITS
    group_size: int = 128

    def check(self, config: ModelConfig, options: BuildOptions) -> None:
        """Raise BuildError for heads or options that the kernels do not take."""
        check_heads(self.name, config, _LARGEST_HEAD)
        check_choices(self.name, options, _CHOICES)
        if options.gemm_plugin != "auto":
            raise BuildError("gemm_plugin disable is for target cpu; leave it out")

    def dtype(self, options: BuildOptions) -> str:
        """The type of activations and of weights that are not quantized: bfloat16 unless asked."""
        return "bfloat16" if options.dtype == "auto" else options.dtype

    def kv_dtype(self, options: BuildOptions, dense: bool) -> str:
        """As asked; ``auto`` is the type of the activations."""
        return _KV_DTYPES[options.kv_cache_dtype] or self.dtype(options)

    def capability(self, program: Program, kv_dtype: str) -> str:
        """The oldest architecture that runs the engine."""
        linears = [*program.nodes("Linear"), *program.nodes("ExpertLinear")]
        types = {node.attributes["weight_type"].as_int() for node in linears}
        fp8 = kv_dtype == "float8_e4m3fn" or WEIGHT_TYPES["float8_e4m3"] in types
        return "sm_89" if fp8 else "sm_80"

    def pipeline(self, options: BuildOptions) -> Sequence[Pass]:
        """Prepare the weights, fuse into five kernels a layer, pack."""
        dtype = self.dtype(options)
        kernels = Kernels(
            holds=(can_pack,),
            group_size=self.group_size,
            integers=("float4_e2m1",),
            rounds=_rounds,
            rounding="not rounded",
            dtype=dtype,
        )
        return (
            *preparation(self.name, kernels, options),
            fuse_embedding_shard,
            fuse_parallel_linears,
            partial(fuse_gate, holds=_any),
            fuse_all_reduce,
            partial(fuse_residual, holds=_any),
            partial(fuse_norm, holds=_any),
            fuse_add_rms_norm,
            fuse_router,
            fuse_rotary,
            use_row_major_keys,
            PackWeights(dtype),
            StoreVectors(dtype),
            SetPrecision(dtype),
        )


def _any(fmt: WeightFormat) -> bool:
    """What the kernels do not hold is dequantized when it is packed, so everything fuses."""
    return True


def _rounds(fmt: WeightFormat) -> bool:
    """Whether a kernel multiplies in the type of the codes, and rounds x as the format says."""
    return fmt.kind == "float8_e4m3" or whole_rows(fmt)


TARGET = CUDATarget()
