"""MXFP4 as gpt-oss ships it: float4 (e2m1) in blocks of 32 beside their exponents.

Layout: transformers, integrations/mxfp4.py. A byte holds two columns, the even one in the low
nibble; a scale is 2 ** (byte - 127). What ``modules_to_not_convert`` names has no blocks.
"""

from __future__ import annotations

from dataclasses import replace

from slipstream.builder.checkpoints.quantized.scales import Grid
from slipstream.builder.checkpoints.quantized.stored import (
    QuantizedWeights,
    Stored,
    dense_linears,
)
from slipstream.builder.checkpoints.quantized.weights import Parts, float4_weight
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import StoredTensor
from slipstream.weights.tensor import LazyTensor

_BLOCK = 32


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """Every weight of the directory, none of them read yet."""
    tensors = {f"{name}.weight": _weight(stored, name) for name in stored.modules("blocks")}
    tensors |= stored.take_dense()
    kept = dense_linears({n: t for n, t in tensors.items() if ".experts." in n})
    told = f"{len(kept)} modules of experts are not quantized, such as {kept[0]}" if kept else ""
    return QuantizedWeights(tensors, notes=(told,) if told else ())


def _weight(stored: Stored, name: str) -> LazyTensor:
    blocks = stored.take(f"{name}.blocks", "U8")
    if len(blocks.shape) != 3 or blocks.shape[2] * 2 != _BLOCK or 0 in blocks.shape:
        raise CheckpointError(
            f"{stored.path}: tensor {blocks.name} has shape {list(blocks.shape)}, where rows of "
            f"blocks of {_BLOCK // 2} bytes belong; download the checkpoint again"
        )
    scales = stored.take(f"{name}.scales", "U8", shape=blocks.shape[:2])
    return float4_weight(Parts(f"{name}.weight", _pairs(blocks), scales, Grid(1, _BLOCK), bits=4))


def _pairs(blocks: StoredTensor) -> StoredTensor:
    """The bytes of a row behind each other: a block ends where the next one begins."""
    rows, groups, size = blocks.shape
    strides = None if blocks.strides is None else (blocks.strides[0], blocks.strides[2])
    return replace(blocks, shape=(rows, groups * size), strides=strides)
