"""Codes, scales and offsets of GGUF's block types.

Layouts and meaning: ggml-common.h and gguf-py of llama.cpp. Every function takes blocks u8
``[N, B, bytes]`` and returns codes of a row after another, as ``QuantTensor`` packs them; scales
and offsets are multiplied in float32 in the order of llama.cpp, so that numbers come out equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slipstream.weights.tensor import WeightFormat

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]
Decoded = tuple[Bytes, Numbers, Numbers | None]

# The numbers of the codes of IQ4_NL and IQ4_XS.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)
_MIDPOINT = 128


@dataclass(frozen=True, slots=True)
class BlockType:
    """``elements`` of a block, the format of a weight made of them, and how they are decoded."""

    elements: int
    format: WeightFormat
    decode: Callable[[Bytes], Decoded]


def _half(blocks: Bytes, start: int) -> Numbers:
    """The float16 at a byte of each block: ``[N, B]``."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]


def _single(blocks: Bytes, start: int) -> NDArray[np.float32]:
    """The same as float32, ready to be multiplied by a number for each group: ``[N, B, 1]``."""
    return _half(blocks, start).astype(np.float32)[..., None]


def _neighbours(stored: Bytes) -> Bytes:
    """Bytes of nibbles (j, j + half) to bytes of nibbles (2i, 2i + 1)."""
    even, odd = stored[..., 0::2], stored[..., 1::2]
    low = (even & 15) | (odd << 4)
    high = (even >> 4) | (odd & 0xF0)
    return np.concatenate([low, high], axis=-1)


def _paired(codes: Bytes) -> Bytes:
    """Codes of one a byte as nibbles (2i, 2i + 1)."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def _fields(stored: Bytes, bits: int, size: int) -> Bytes:
    """Fields of ``bits`` in bytes: all lowest ones of ``size`` bytes, then the next, and so on.

    u8 ``[..., bytes]`` to ``[..., bytes * 8 / bits]``.
    """
    parts = stored.reshape(*stored.shape[:-1], -1, 1, size)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = (parts >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(fields.reshape(*stored.shape[:-1], -1), np.uint8)


def _bits(stored: Bytes, place: int) -> Bytes:
    """Every bit of some bytes, the lowest first, moved to a place of a byte of its own."""
    return _raised(np.unpackbits(stored, axis=-1, bitorder="little"), place)


def _raised(codes: Bytes, places: int) -> Bytes:
    """The upper bits of codes, in their place."""
    return np.asarray(codes << places, np.uint8)


def _q4_0(blocks: Bytes) -> Decoded:
    return _neighbours(blocks[..., 2:]), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Decoded:
    return _neighbours(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Decoded:
    codes = _fields(blocks[..., 6:], 4, 16) | _bits(blocks[..., 2:6], 4)
    return codes + np.uint8(_MIDPOINT - 16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Decoded:
    codes = _fields(blocks[..., 8:], 4, 16) | _bits(blocks[..., 4:8], 4)
    return codes, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Decoded:
    # Flipping the top bit of a two's complement byte adds 128.
    return blocks[..., 2:] ^ np.uint8(0x80), _half(blocks, 0), None


def _q2_k(blocks: Bytes) -> Decoded:
    both = blocks[..., :16]
    codes = _fields(blocks[..., 16:80], 2, 32)
    scale = _single(blocks, 80) * (both & 15).astype(np.float32)
    return _paired(codes), scale, -(_single(blocks, 82) * (both >> 4).astype(np.float32))


def _q3_k(blocks: Bytes) -> Decoded:
    low, packed = _fields(blocks[..., 32:96], 2, 32), blocks[..., 96:108]
    six = _fields(packed[..., :8], 4, 8) | _raised(_fields(packed[..., 8:], 2, 4), 4)
    scale = _single(blocks, 108) * (six.astype(np.float32) - 32)
    codes = low | _raised(_fields(blocks[..., :32], 1, 32), 2)  # 0..7 around 4
    return _paired(codes + np.uint8(4)), scale, None


def _scales_of_k(blocks: Bytes) -> tuple[Numbers, Numbers]:
    """Scales and offsets ``[N, B, 8]`` of Q4_K and Q5_K: 6 bits each, times two float16."""
    packed = blocks[..., 4:16]
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([first & 63, (last & 15) | ((first >> 2) & 48)], axis=-1)
    least = np.concatenate([second & 63, (last >> 4) | ((second >> 2) & 48)], axis=-1)
    offset = _single(blocks, 2) * least.astype(np.float32)
    return _single(blocks, 0) * scale.astype(np.float32), -offset


def _q4_k(blocks: Bytes) -> Decoded:
    pairs = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    return _neighbours(pairs), *_scales_of_k(blocks)


def _q5_k(blocks: Bytes) -> Decoded:
    codes = _fields(blocks[..., 48:], 4, 32) | _raised(_fields(blocks[..., 16:48], 1, 32), 4)
    return codes, *_scales_of_k(blocks)


def _q6_k(blocks: Bytes) -> Decoded:
    low, high = _fields(blocks[..., :128], 4, 64), _fields(blocks[..., 128:192], 2, 32)
    scales = blocks[..., 192:208].view(np.int8).astype(np.float32)
    codes = (low | _raised(high, 4)) + np.uint8(_MIDPOINT - 32)
    return codes, _single(blocks, 208) * scales, None


def _numbered(stored: Bytes, numbers: NDArray[np.int16]) -> Bytes:
    """Nibbles (j, j + 16) as the numbers that they stand for, around 128."""
    return (numbers + _MIDPOINT).astype(np.uint8)[_fields(stored, 4, 16)]


def _iq4_nl(blocks: Bytes) -> Decoded:
    return _numbered(blocks[..., 2:], _IQ4), _half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Decoded:
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1)
    words = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16)
    high = ((words >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    six = low.reshape(high.shape) | (high << 4)
    scale = _single(blocks, 0) * (six.astype(np.float32) - 32)
    return _numbered(blocks[..., 8:], _IQ4), scale, None


def _mxfp4(blocks: Bytes) -> Decoded:
    # Half of the scale for twice the numbers there, so that the byte is the exponent plus 127.
    scale = np.ascontiguousarray(blocks[..., 0]).view(ml_dtypes.float8_e8m0fnu)
    return _neighbours(blocks[..., 1:]), scale, None


_MXFP4 = WeightFormat((), "float4_e2m1", "float8_e8m0fnu", 4, 32)


def _format(bits: int, group: int, zero: str, dtype: str = "float16") -> WeightFormat:
    return WeightFormat((), "int", dtype, bits, group, zero)  # type: ignore[arg-type]


BLOCKS: Mapping[Type, BlockType] = MappingProxyType(
    {
        Type.Q4_0: BlockType(32, _format(4, 32, "midpoint"), _q4_0),
        Type.Q4_1: BlockType(32, _format(4, 32, "offset"), _q4_1),
        Type.Q5_0: BlockType(32, _format(8, 32, "midpoint"), _q5_0),
        Type.Q5_1: BlockType(32, _format(8, 32, "offset"), _q5_1),
        Type.Q8_0: BlockType(32, _format(8, 32, "midpoint"), _q8_0),
        Type.Q2_K: BlockType(256, _format(4, 16, "offset", "float32"), _q2_k),
        Type.Q3_K: BlockType(256, _format(4, 16, "midpoint", "float32"), _q3_k),
        Type.Q4_K: BlockType(256, _format(4, 32, "offset", "float32"), _q4_k),
        Type.Q5_K: BlockType(256, _format(8, 32, "offset", "float32"), _q5_k),
        Type.Q6_K: BlockType(256, _format(8, 16, "midpoint", "float32"), _q6_k),
        Type.IQ4_NL: BlockType(32, _format(8, 32, "midpoint"), _iq4_nl),
        Type.IQ4_XS: BlockType(256, _format(8, 32, "midpoint", "float32"), _iq4_xs),
        Type.MXFP4: BlockType(32, _MXFP4, _mxfp4),
    }
)
