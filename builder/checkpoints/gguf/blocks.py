"""GGUF tensor data as QuantTensor: known blocks losslessly, everything else as float32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize
from numpy.typing import NDArray

from slipstream.builder.checkpoints.gguf.codes import BLOCKS, BlockType
from slipstream.errors import CheckpointError
from slipstream.weights.parallel import in_parallel, row_chunks
from slipstream.weights.tensor import QuantTensor, WeightFormat, reordered

Bytes = NDArray[np.uint8]

_CHUNK = 1 << 18  # bytes decoded at once: temporaries stay in the cache of a core

_DENSE: Mapping[Type, type[np.generic]] = MappingProxyType(
    {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
)


def is_lossless(kind: Type, shape: tuple[int, ...]) -> bool:
    """Whether a tensor keeps its stored numbers; the others become float32 when they are read."""
    return kind in _DENSE or (kind in BLOCKS and len(shape) == 2)


def weight_format(name: str, kind: Type, shape: tuple[int, ...]) -> WeightFormat:
    """The format that ``decode`` will give; CheckpointError for a type that nobody can decode."""
    if kind in _DENSE:
        return WeightFormat(shape, "dense", np.dtype(_DENSE[kind]).name)
    if is_lossless(kind, shape):
        return dataclasses.replace(BLOCKS[kind].format, shape=shape)
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
    block = BLOCKS[kind]
    blocks = rows.reshape(shape[0], shape[1] // block.elements, -1)
    return QuantTensor(name, form, **_decoded(blocks, block))


def _decoded(blocks: Bytes, block: BlockType) -> dict[str, Any]:
    """Codes, scale and, where there is one, offset, as ``QuantTensor`` holds them."""
    names = ("codes", "scale", "offset")
    count = len(blocks)
    # Of one row, to know what there is.
    sample = zip(names, block.decode(blocks[:1]), strict=True)
    found = {
        name: np.empty((count, part.size // max(1, len(part))), part.dtype)
        for name, part in sample
        if part is not None
    }

    def decode_rows(rows: slice) -> None:
        for name, part in zip(names, block.decode(blocks[rows]), strict=True):
            if part is not None:
                found[name][rows] = part.reshape(rows.stop - rows.start, -1)

    in_parallel(decode_rows, row_chunks(count, blocks[:1].nbytes, _CHUNK))
    return found


def undo_rope_permutation(tensor: QuantTensor, heads: int) -> QuantTensor:
    """Rows of a q or k projection from llama.cpp's order back to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows (i, i + D/2), so its
    converter interleaves the halves of each head. Blocks run along a row: moving rows keeps them.
    """
    rows = tensor.format.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(
            f"tensor {tensor.name} has {rows} rows, which are not those of {heads} heads; the GGUF "
            "file contradicts itself: download it again"
        )
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
    return reordered(tensor, order)
