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
