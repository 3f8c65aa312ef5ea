"""Streams an engine's weights into one safetensors file, a few weights at a time.

An engine may be larger than memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.graph.program import StoredWeight
from slipstream.cores import usable_cores
from slipstream.errors import BuildError
from slipstream.weights.safetensors import ArraySpec, encode_header

# Parts of one weight are made by all cores (``in_parallel``), so that a few weights at once are
# enough to keep these busy while others are stacked and written.
_WEIGHTS_AT_ONCE = 4
ALIGNMENT = 64  # a cache line; kernels read weights where the file is mapped


def write_weights(
    path: Path, weights: Sequence[StoredWeight], progress: Callable[[int], None]
) -> dict[str, tuple[int, int]]:
    """Write every weight and return the place of each part in the file: name -> (offset, bytes).

    ``progress`` is told the bytes of each part as it is written, one call at a time. Peak memory is
    that of the largest weight: others are made beside each other where they are no larger together.
    """
    ordered = sorted(weights, key=_alignment, reverse=True)
    specs = [part for weight in ordered for part in weight.parts]
    header, places = encode_header(specs, {"format": "slipstream"}, ALIGNMENT)
    room = _Room(max((_size(weight) for weight in weights), default=0))
    with path.open("wb", buffering=0) as file:

        def write(weight: StoredWeight) -> None:
            with room.of(_size(weight)):
                for part, array in zip(weight.parts, weight.load(), strict=True):
                    _write_at(file.fileno(), _checked_bytes(part, array), places[part.name][0])
                    with room.changed:
                        progress(part.nbytes)

        _write_at(file.fileno(), memoryview(header), 0)
        with ThreadPoolExecutor(min(_WEIGHTS_AT_ONCE, usable_cores())) as pool:
            written = [pool.submit(write, weight) for weight in ordered]
            try:
                for weight in written:
                    weight.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    return places


class _Room:
    """A number of bytes that several threads share."""

    def __init__(self, size: int) -> None:
        self._size, self._used = size, 0
        self.changed = Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait until there are so many, and hold them."""
        with self.changed:
            self.changed.wait_for(lambda: self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self.changed:
                self._used -= size
                self.changed.notify_all()


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _size(weight: StoredWeight) -> int:
    return sum(part.nbytes for part in weight.parts)


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
