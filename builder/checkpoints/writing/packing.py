"""Codes in words of 32 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
