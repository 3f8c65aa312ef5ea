"""The container of a GGUF file: metadata and where each tensor lies."""

from __future__ import annotations

import re
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

# As llama.cpp names the parts of a model.
_PART = re.compile(r"(?P<model>.*)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)


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
    """A whole model: metadata as Python values and tensors by GGUF name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Reads metadata and tensor table, of all parts if the file is one of several.

    Raises CheckpointError for a truncated or foreign file, and for parts that are not all there.
    """
    file = _read_part(path)
    count = Fields(file.metadata, Origin(path)).integer("split.count", 1)
    return file if count < 2 else _joined(path, count)


def _read_part(path: Path) -> GGUFFile:
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # The package reports a damaged file through whatever its parsing trips over.
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({error}); it is truncated, damaged or of another "
            "format: download it again"
        ) from error
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


def _joined(path: Path, count: int) -> GGUFFile:
    """The model that is split into ``count`` files, of which ``path`` is any; the first has the
    metadata."""
    parts = [_read_part(part) for part in _paths_of_parts(path, count)]
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        fields = Fields(part.metadata, Origin(part.path))
        found = fields.integer("split.no"), fields.integer("split.count", 1)
        if found != (number, count) or not tensors.keys().isdisjoint(part.tensors):
            raise CheckpointError(
                f"{part.path} is not part {number + 1} of the {count} that {path.name} belongs to; "
                "download all of them again"
            )
        tensors |= part.tensors
    total = Fields(parts[0].metadata, Origin(parts[0].path)).integer("split.tensors.count")
    if len(tensors) != total:
        raise CheckpointError(
            f"the {count} parts of {path} hold {len(tensors)} tensors of {total}; download them "
            "again"
        )
    return GGUFFile(parts[0].path, parts[0].metadata, tensors)


def _paths_of_parts(path: Path, count: int) -> list[Path]:
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, and its name does not say how the others are called; "
            f"download all of them again, as MODEL-00001-of-{count:05d}.gguf and so on, or join "
            "them with llama.cpp's llama-gguf-split --merge"
        )
    end = f"-of-{name['count']}{name['suffix']}"
    parts = [path.with_name(f"{name['model']}-{n + 1:05d}{end}") for n in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} parts, of which {len(missing)} are not beside it: "
            f"{', '.join(missing[:5])}; download them into that directory"
        )
    return parts


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
