"""What a build can be told. Defaults live here; the command line and the Python API read them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal, get_args

from slipstream.builder.engine import EngineLimits
from slipstream.errors import BuildError

Quantization = Literal["none", "int8_wo", "int4_wo"]
KVCacheDtype = Literal["auto", "float32", "float16", "int8"]
GemmPlugin = Literal["auto", "disable"]
_LIMITS = EngineLimits()


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to compile a checkpoint.

    quantization    weight-only, round to nearest, applied to weights that the checkpoint holds
                    dense
    group_size      elements along K that share a scale
    symmetric       no zero points
    kv_cache_dtype  auto: float32 for a dense engine, float16 for a quantized one
    gemm_plugin     auto: quantized linears run on Slipstream's kernels; disable: on ONNX Runtime's
                    MatMulNBits
    """

    target: str = "auto"
    quantization: Quantization = "none"
    group_size: int = 32
    symmetric: bool = False
    kv_cache_dtype: KVCacheDtype = "auto"
    gemm_plugin: GemmPlugin = "auto"
    max_batch_size: int = _LIMITS.max_batch_size
    max_num_tokens: int = _LIMITS.max_num_tokens
    max_seq_len: int | None = None

    def __post_init__(self) -> None:
        """Check every value; BuildError says what was given and what is allowed."""
        _choice("quantization", self.quantization, get_args(Quantization))
        _choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDtype))
        _choice("gemm_plugin", self.gemm_plugin, get_args(GemmPlugin))
        _choice("group_size", self.group_size, (32, 64, 128))
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}; it must be at least 1")

    @property
    def bits(self) -> Literal[4, 8] | None:
        """Bits of quantized weights; None when weights are kept as they are."""
        bits: dict[Quantization, Literal[4, 8] | None] = {"none": None, "int8_wo": 8, "int4_wo": 4}
        return bits[self.quantization]

    def command(self, source: str, output: str) -> str:
        """The command that makes this build, with every option that differs from its default."""
        defaults = BuildOptions()
        words = ["slipstream", "build", source, "-o", output]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value == getattr(defaults, name):
                continue
            flag = name.replace("_", "-")
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        return shlex.join(words)


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise BuildError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
