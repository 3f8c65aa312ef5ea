"""Streams an engine's weights into one safetensors file, a weight at a time.

An engine may be larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.graph.program import StoredWeight
from slipstream.errors import BuildError
from slipstream.weights.safetensors import ArraySpec, encode_header

ALIGNMENT = 64  # a cache line; kernels read weights where the file is mapped


def write_weights(
    path: Path, weights: Sequence[StoredWeight], progress: Callable[[int], None]
) -> dict[str, tuple[int, int]]:
    """Write every weight and return the place of each part in the file: name -> (offset, bytes).

    ``progress`` is told the bytes of each weight as it is written. Peak memory is one weight's.
    """
    ordered = sorted(weights, key=_alignment, reverse=True)
    specs = [part for weight in ordered for part in weight.parts]
    header, places = encode_header(specs, {"format": "slipstream"}, ALIGNMENT)
    with path.open("wb") as file:
        file.write(header)
        for weight in ordered:
            for part, array in zip(weight.parts, weight.load(), strict=True):
                file.write(_checked_bytes(part, array))
                progress(part.nbytes)
    return places


def _alignment(weight: StoredWeight) -> int:
    # safetensors allows no holes, so what breaks the alignment of its successors goes behind them:
    # every element of a weight of one part then lies at a multiple of its size.
    return min(math.gcd(part.nbytes, ALIGNMENT) for part in weight.parts)


def _checked_bytes(part: ArraySpec, array: NDArray[np.generic]) -> memoryview:
    if ArraySpec.of(part.name, array) != part:
        raise BuildError(
            f"weight {part.name} was declared {part.dtype} {part.shape} but holds "
            f"{array.dtype} {array.shape}; "
            "the checkpoint contradicts its own metadata: download it again"
        )
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
