"""GGUF tensor data as QuantTensor: blocks we can hold losslessly, everything else as float32.

Block layouts: ggml-common.h of llama.cpp; a block is 32 consecutive elements of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize
from numpy.typing import NDArray

from slipstream.errors import CheckpointError
from slipstream.quantize.tensor import QuantTensor, WeightFormat

Bytes = NDArray[np.uint8]

_DENSE: Mapping[Type, type[np.generic]] = MappingProxyType(
    {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
)


def is_lossless(kind: Type, shape: tuple[int, ...]) -> bool:
    """Whether a tensor keeps its stored numbers; the others become float32 when they are read."""
    return kind in _DENSE or (kind in _BLOCKS and len(shape) == 2)


def weight_format(name: str, kind: Type, shape: tuple[int, ...]) -> WeightFormat:
    """The format that ``decode`` will give; CheckpointError for a type that nobody can decode."""
    if kind in _DENSE:
        return WeightFormat(shape, "dense", np.dtype(_DENSE[kind]).name)
    if is_lossless(kind, shape):
        return dataclasses.replace(_BLOCKS[kind][0], shape=shape)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"tensor {name} has GGUF type {kind.name}, which cannot be decoded; use a file of a "
            "common type such as Q4_1, Q8_0, Q4_K_M or F16"
        ) from error
    return WeightFormat(shape, "dense", "float32")


def decode(name: str, kind: Type, shape: tuple[int, ...], data: Bytes) -> QuantTensor:
    """The tensor of ``shape`` (rows first) whose bytes are ``data`` (u8, one dimension)."""
    form = weight_format(name, kind, shape)
    if kind in _DENSE:
        return QuantTensor(name, form, data.view(_DENSE[kind]).reshape(shape))
    rows = data.reshape(math.prod(shape[:-1]), -1)
    if not is_lossless(kind, shape):
        values = np.asarray(dequantize(rows, kind), np.float32)
        return QuantTensor(name, form, values.reshape(shape))
    blocks = rows.reshape(shape[0], shape[1] // form.group, -1)
    codes, scale, offset = _BLOCKS[kind][1](blocks)
    return QuantTensor(name, form, codes.reshape(shape[0], -1), scale, offset=offset)


def undo_rope_permutation(tensor: QuantTensor, heads: int) -> QuantTensor:
    """Rows of a q or k projection from llama.cpp's order back to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows (i, i + D/2), so its
    converter interleaves the halves of each head. Blocks run along a row: moving rows keeps them.
    """
    rows = tensor.format.shape[0]
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
    return dataclasses.replace(
        tensor,
        codes=tensor.codes[order],
        scale=None if tensor.scale is None else tensor.scale[order],
        offset=None if tensor.offset is None else tensor.offset[order],
    )


Decoded = tuple[Bytes, NDArray[np.generic], NDArray[np.generic] | None]


def _half(blocks: Bytes, index: int) -> NDArray[np.generic]:
    """The float16 number ``index`` at the start of each block: ``[N, K/32]``."""
    return np.ascontiguousarray(blocks[..., 2 * index : 2 * index + 2]).view(np.float16)[..., 0]


def _neighbours(stored: Bytes) -> Bytes:
    """16 bytes of (j, j+16) nibbles, as in a Q4 block, to 16 bytes of (2i, 2i+1) nibbles."""
    even, odd = stored[..., 0::2], stored[..., 1::2]
    low = (even & 15) | (odd << 4)
    high = (even >> 4) | (odd & 0xF0)
    return np.concatenate([low, high], axis=-1)


def _q4_0(blocks: Bytes) -> Decoded:
    return _neighbours(blocks[..., 2:]), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Decoded:
    return _neighbours(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 1)


def _q8_0(blocks: Bytes) -> Decoded:
    # Flipping the top bit of a two's complement byte adds 128.
    return blocks[..., 2:] ^ np.uint8(0x80), _half(blocks, 0), None


_BLOCKS: Mapping[Type, tuple[WeightFormat, Callable[[Bytes], Decoded]]] = MappingProxyType(
    {
        Type.Q4_0: (WeightFormat((), "int", "float16", 4, 32, "midpoint"), _q4_0),
        Type.Q4_1: (WeightFormat((), "int", "float16", 4, 32, "offset"), _q4_1),
        Type.Q8_0: (WeightFormat((), "int", "float16", 8, 32, "midpoint"), _q8_0),
    }
)
