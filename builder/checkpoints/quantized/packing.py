"""Codes of b bits in little-endian integers, the first code in the lowest bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unpack_codes(words: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    """Codes along the last axis: ``[..., W]`` integers to u8 ``[..., W * size // bits]``, ``size``
    being the bits of an integer.

    A code may straddle two integers, as those of 3 bits do.
    """
    stream: NDArray[Any] = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (stream[..., None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(*stream.shape[:-1], -1)
    flags = np.unpackbits(stream, axis=-1, bitorder="little")
    count = flags.shape[-1] // bits
    grouped = flags[..., : count * bits].reshape(*flags.shape[:-1], count, bits)
    return np.packbits(grouped, axis=-1, bitorder="little")[..., 0]


def pack_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Codes ``[R, C]`` of 4 or 8 bits along C to int32 ``[R, ceil(C * bits / 32)]``, the first
    code in the lowest bits, the last word filled with zeros."""
    per_word = 32 // bits
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // per_word) * per_word), np.uint32)
    padded[:, :columns] = codes
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    words = padded.reshape(rows, -1, per_word) << shifts
    packed: NDArray[np.uint32] = np.bitwise_or.reduce(words, axis=2)
    return packed.view(np.int32)
