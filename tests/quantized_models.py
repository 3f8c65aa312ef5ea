"""Checkpoints in memory, quantized in any scheme, for tests of what builds engines of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tests.tiny_models import LLAMA, Arrays, llama_tensors, write_tiny_tokenizer

from slipstream.builder.models.config import ModelConfig
from slipstream.builder.pooling import StatedPooling
from slipstream.weights.tensor import (
    E2M1,
    Activation,
    InputTransform,
    KVScales,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    ZeroKind,
    numpy_dtype,
    pack_nibbles,
)

Matrix = NDArray[np.float32]
Scheme = Callable[[str, Matrix], QuantTensor]
NF4 = np.array(
    [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1],
    np.float32,
)  # fmt: skip
# Widths of which 128 is no divisor but 64 is.
RAGGED: dict[str, Any] = {
    **LLAMA,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class MemoryCheckpoint:
    """``tensors`` by name; what they say is checked when they are loaded."""

    config: ModelConfig
    tensors: Mapping[str, QuantTensor]
    kv_scales: KVScales | None = None
    path: Path = Path("memory")
    pooling: StatedPooling | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def tensor(self, name: str) -> LazyTensor:
        tensor = self.tensors[name]
        return LazyTensor(name, tensor.format, lambda: tensor, tensor.input)

    def write_tokenizer(self, directory: Path) -> None:
        write_tiny_tokenizer(directory)

    def effective(self) -> Arrays:
        """The dense weights that a model of this checkpoint multiplies by."""
        return {name: tensor.dequantize() for name, tensor in self.tensors.items()}


def quantized_llama(
    schemes: Mapping[str, Scheme],
    *,
    kv_scales: KVScales | None = None,
    **changes: Any,  # noqa: ANN401 - keys of config.json
) -> MemoryCheckpoint:
    """``RAGGED`` with these changes; a tensor takes the scheme of the first key in its name."""
    shape = {**RAGGED, **changes}
    tensors: dict[str, QuantTensor] = {}
    for name, array in llama_tensors(**shape).items():
        scheme = next((s for key, s in schemes.items() if key in name and array.ndim == 2), dense)
        tensors[name] = scheme(name, array)
    return MemoryCheckpoint(ModelConfig.from_huggingface(shape), tensors, kv_scales)


def dense(name: str, w: Matrix) -> QuantTensor:
    return QuantTensor(name, WeightFormat(w.shape, "dense", "float32"), w)


def integers(
    bits: int,
    group: int = 0,
    zero: ZeroKind = "midpoint",
    *,
    dtype: str = "float16",
    activation: Activation = "none",
    beyond: bool = False,
) -> Scheme:
    """Groups of ``group`` (0: whole rows), the last one perhaps shorter; ``beyond`` makes some zero
    points 16, as GPTQ files can have them in 4 bits."""

    def quantize(name: str, w: Matrix) -> QuantTensor:
        size = group or w.shape[1]
        low, high = (spread(w, size, f) for f in (np.min, np.max))
        fmt = WeightFormat(w.shape, "int", dtype, bits, size, zero, activation=activation)
        top = 2**bits - 1
        offsets = zeros = None
        if zero == "midpoint":
            scale = (np.maximum(np.abs(low), np.abs(high)) / (top // 2)).astype(numpy_dtype(dtype))
            add: Any = top // 2 + 1
        else:
            scale = ((np.maximum(high, 0) - np.minimum(low, 0)) / top).astype(numpy_dtype(dtype))
            add = np.rint(-np.minimum(low, 0) / scale.astype(np.float32))
            add[::5, 0] = 16 if beyond else add[::5, 0]
            zeros = add.astype(np.uint8)
        codes = np.clip(np.rint(w / each(scale, size, w)) + each(add, size, w), 0, top)
        if zero == "offset":
            offsets, zeros = (-add * scale.astype(np.float32)).astype(numpy_dtype(dtype)), None
        packed = codes.astype(np.uint8)
        static = np.array([0.05], np.float32) if activation == "static" else None
        return QuantTensor(
            name, fmt, pack_nibbles(packed) if bits == 4 else packed, scale, zeros, offsets, static
        )

    return quantize


def float8(
    rows: int = 1, group: int = 0, *, activation: Activation = "token", dtype: str = "float32"
) -> Scheme:
    """A scale for each block; ``group`` 0 is the whole row."""

    def quantize(name: str, w: Matrix) -> QuantTensor:
        size = group or w.shape[1]
        high = spread(np.abs(w), size, np.max)
        high = np.maximum.reduceat(high, np.arange(0, len(w), rows), axis=0)
        scale = (high / 448).astype(numpy_dtype(dtype))
        wide = np.repeat(each(scale, size, w), rows, axis=0)[: len(w)]
        codes = np.clip(w / wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        static = np.array([0.02], np.float32) if activation == "static" else None
        fmt = WeightFormat(w.shape, "float8_e4m3", dtype, 8, size, rows=rows, activation=activation)
        return QuantTensor(name, fmt, codes, scale, input_scale=static)

    return quantize


def float4(name: str, w: Matrix) -> QuantTensor:
    """NVFP4: groups of 16 with float8 scales, and one number for all of them."""
    numbers = np.concatenate([E2M1, -E2M1])
    high = spread(np.abs(w), 16, np.max)
    whole = np.float32(high.max() / 6 / 448)
    scale = (high / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    fmt = WeightFormat(w.shape, "float4_e2m1", "float8_e4m3fn", 4, 16)
    codes = nearest(w / (each(scale, 16, w) * whole), numbers)
    return QuantTensor(name, fmt, pack_nibbles(codes), scale, scale2=np.array([whole]))


def nf4(name: str, w: Matrix) -> QuantTensor:
    """bitsandbytes' codebook in groups of 64."""
    scale = spread(np.abs(w), 64, np.max)
    codes = nearest(w / each(scale, 64, w), NF4)
    fmt = WeightFormat(w.shape, "codebook", "float32", 4, 64)
    return QuantTensor(name, fmt, pack_nibbles(codes), scale, codebook=NF4)


def with_input(scheme: Scheme, *, order: int | None = None, scale: int | None = None) -> Scheme:
    """The same with act-order and a pre-scale of these seeds: equal seeds are equal transforms."""

    def quantize(name: str, w: Matrix) -> QuantTensor:
        k = w.shape[1]
        perm = factors = None
        if scale is not None:
            factors = np.random.default_rng(scale).uniform(0.5, 2, size=(k,)).astype(np.float32)
            w = w / factors
        if order is not None:
            perm = np.random.default_rng(order).permutation(k).astype(np.int32)
            w = w[:, perm]
        return replace(scheme(name, w), input=InputTransform(perm, factors))

    return quantize


def spread(w: Matrix, size: int, function: Callable[..., Any]) -> Matrix:
    """A number of every group of a row: ``[N, ceil(K/size)]``."""
    parts = [w[:, k : k + size] for k in range(0, w.shape[1], size)]
    return np.stack([function(part, axis=1) for part in parts], axis=1).astype(np.float32)


def each(numbers: Any, size: int, w: Matrix) -> Any:  # noqa: ANN401 - a number or some
    """A group's number for each of its elements."""
    if isinstance(numbers, int | float):
        return numbers
    return np.repeat(numbers.astype(np.float32), size, axis=1)[:, : w.shape[1]]


def nearest(w: Matrix, numbers: Matrix) -> NDArray[np.uint8]:
    return np.asarray(np.abs(w[..., None] - numbers).argmin(axis=-1), np.uint8)
