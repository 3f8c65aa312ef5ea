"""What a build can be told. Defaults live here; the command line and the Python API read them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal, get_args

from slipstream.builder.engine import RANKS
from slipstream.errors import BuildError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8_wo", "int4_wo", "fp8"]
KVCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8", "k16v8"]
GemmPlugin = Literal["auto", "disable"]
OrtAttention = Literal["auto", "slots", "pages"]
OrtActivations = Literal["exact", "int8"]
Task = Literal["auto", "generate", "embed", "score"]
PoolingType = Literal["auto", "last", "mean"]
# Layouts of quantized checkpoints that can be written.
OutputFormat = Literal["compressed-tensors", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to compile a checkpoint. What is None is left to the target.

    dtype           on a CPU of weights that are not quantized, auto: as the checkpoint has them;
                    on a GPU of activations too, auto: bfloat16. Activations on a CPU are float32
    quantization    applied to weights that the checkpoint holds dense, without looking at data:
                    integer groups rounded to nearest (weight-only), or e4m3 with a scale a row and
                    activations rounded with a scale a token (fp8, on a GPU)
    group_size      elements along K that share a scale; for integer groups only
    symmetric       no zero points; for integer groups only, which have them by default
    kv_cache_dtype  auto: fp8 where the checkpoint has scales for it; else on a CPU float32 for a
                    dense engine and float16 for a quantized one, on a GPU the dtype. k16v8: keys of
                    16 bits and values of 8, in units of a scale a token and head (on a CPU)
    strict_tensors  refuse a checkpoint of which tensors are left out: those of images, of layers
                    that predict further tokens, a head beside the embedding that it is tied to
    task            what the engine is for: to generate text, to make vectors of texts (embed), or
                    to score how well a document answers a query by the logits of yes and no
                    (score); auto: what the checkpoint's files of sentence-transformers, its GGUF
                    metadata or its architecture say, else generate
    pooling         which tokens' states make a vector: the last one's, or the mean of all; auto:
                    what the checkpoint says, else last
    speculative_model
                    a head that guesses the model's tokens (EAGLE-3), which goes into the same
                    engine
    gemm_plugin     auto: linears run on Slipstream's kernels; disable: on ONNX Runtime's
                    MatMulNBits and Gemm
    tp_size         ranks that share every layer (tensor parallelism), each a process with a part
                    of every matrix: heads, the width of the MLP or of experts, the vocabulary
    ort_attention   what attention of an engine for onnxruntime reads: a slot for each sequence
                    (slots, GroupQueryAttention), or pages, which sequences share (pages,
                    PagedAttention, on its CUDA provider only); auto: slots
    ort_activations what products of an engine for onnxruntime with quantized weights do to x:
                    nothing (exact), or round it in blocks (int8), which only its CPU provider does,
                    with dtype float32, and many times faster
    """

    target: str = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    group_size: int | None = None
    symmetric: bool | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    task: Task = "auto"
    pooling: PoolingType = "auto"
    speculative_model: str | None = None
    gemm_plugin: GemmPlugin = "auto"
    ort_attention: OrtAttention = "auto"
    ort_activations: OrtActivations = "exact"
    strict_tensors: bool = False
    tp_size: int = 1
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None

    def __post_init__(self) -> None:
        """Check every value; BuildError says what was given and what is allowed."""
        _choice("dtype", self.dtype, get_args(Dtype))
        _choice("quantization", self.quantization, get_args(Quantization))
        _choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDtype))
        _choice("task", self.task, get_args(Task))
        _choice("pooling", self.pooling, get_args(PoolingType))
        _choice("gemm_plugin", self.gemm_plugin, get_args(GemmPlugin))
        _choice("tp_size", self.tp_size, RANKS)
        _choice("ort_attention", self.ort_attention, get_args(OrtAttention))
        _choice("ort_activations", self.ort_activations, get_args(OrtActivations))
        if self.group_size is not None:
            _choice("group_size", self.group_size, (32, 64, 128))
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}; it must be at least 1")
        self._check_used()

    def _check_used(self) -> None:
        """BuildError for options that would be ignored."""
        for name in ("group_size", "symmetric"):
            value = getattr(self, name)
            if value is not None and self.bits is None:
                raise BuildError(
                    f"{name} is {value}, but quantization {self.quantization} makes no groups of "
                    "integers; leave it out, or use quantization int4_wo or int8_wo"
                )
        if self.pooling != "auto" and self.task in ("generate", "score"):
            raise BuildError(
                f"pooling is {self.pooling}, but an engine for task {self.task} makes no vectors; "
                "leave it out, or use task embed"
            )
        batch, tokens = self.max_batch_size, self.max_num_tokens
        if batch is not None and tokens is not None and tokens < batch:
            raise BuildError(
                f"max_num_tokens is {tokens}, less than max_batch_size {batch}: a step could not "
                "hold one token of every sequence; raise max_num_tokens or lower max_batch_size"
            )

    @property
    def bits(self) -> Literal[4, 8] | None:
        """Bits of integer groups; None for every other quantization."""
        bits: dict[Quantization, Literal[4, 8]] = {"int8_wo": 8, "int4_wo": 4}
        return bits.get(self.quantization)

    def command(self, source: str, output: str) -> str:
        """The command that makes this build, with every option that differs from its default."""
        defaults = BuildOptions()
        words = ["slipstream", "build", source, "-o", output]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value == getattr(defaults, name):
                continue
            flag = "asymmetric" if value is False else name.replace("_", "-")
            words += [f"--{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return shlex.join(words)


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise BuildError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
