"""Writing the safetensors container: a JSON header, then raw little-endian arrays.

The header is written first, from names, types and shapes, so that arrays can be made one at a time.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.safetensors_file import DTYPES

_ALIGNMENT = 8
_CHUNK = 1 << 24  # bytes written at once
_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the header says of a tensor."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, array: NDArray[np.generic]) -> TensorSpec:
        """That of an array."""
        return cls(name, array.dtype, array.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], arrays: Iterable[NDArray[np.generic]]
) -> None:
    """Writes ``arrays``, which come in the order of ``specs`` and are let go of one by one.

    The file is complete when this returns: its data has been handed to the disk.
    """
    with path.open("wb") as file:
        file.write(_header(specs))
        for spec, array in zip(specs, arrays, strict=True):
            assert TensorSpec.of(spec.name, array) == spec, (spec, array.dtype, array.shape)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK].data)
        file.flush()
        os.fsync(file.fileno())


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Writes arrays by name."""
    write_safetensors(
        path, [TensorSpec.of(name, array) for name, array in arrays.items()], arrays.values()
    )


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": _SPELLINGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
