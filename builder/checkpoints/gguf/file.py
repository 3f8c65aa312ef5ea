"""The container of a GGUF file: metadata and where each tensor lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from numpy.typing import DTypeLike, NDArray

from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin
from slipstream.weights.safetensors import map_array


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies; ``shape`` is rows first, the reverse of the file's order."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int

    def map(self) -> NDArray[np.uint8]:
        """Its bytes, mapped from the file."""
        return map_array(self.path, np.uint8, self.offset, (self.size,)).view(np.uint8)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A whole, single GGUF file: metadata as Python values and tensors by GGUF name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Reads metadata and tensor table; CheckpointError for a truncated or foreign file."""
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # The package reports a damaged file through whatever its parsing trips over.
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({error}); it is truncated, damaged or of another "
            "format: download it again"
        ) from error
    parts = Fields(metadata, Origin(path)).integer("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts; join them with llama.cpp's "
            "llama-gguf-split --merge and pass the result"
        )
    tensors = {
        t.name: GGUFTensor(
            path,
            t.name,
            t.tensor_type,
            tuple(int(n) for n in reversed(t.shape)),
            t.data_offset,
            t.n_bytes,
        )
        for t in reader.tensors
    }
    return GGUFFile(path, metadata, tensors)


class _Reader(GGUFReader):
    """The package's reader with cheaper fields.

    It slices a memmap object for every string of the vocabulary, and three quarters of its time go
    into making those; plain arrays over the same map take a fifth of the time, and unlike slices
    they refuse to reach past the end of the file.
    """

    def _get(
        self,
        offset: int,
        dtype: DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> NDArray[Any]:
        if self.byte_order == "S":
            raise ValueError("its byte order is not this machine's")
        return np.frombuffer(self.data, dtype, int(count), int(offset))
