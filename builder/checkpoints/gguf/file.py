"""The container of a GGUF file: metadata and where each tensor lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader, ReaderField
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import DTypeLike, NDArray

from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin
from slipstream.weights.safetensors import map_array

_ALIGNMENT = "general.alignment"
_LONGEST_NAME = 512  # characters
# Metadata of the largest vocabularies has a million values (tokens, scores, types, merges) in
# 16 MB; the largest models have a few thousand tensors.
_MOST_VALUES, _MOST_BYTES, _MOST_TENSORS = 1 << 21, 1 << 25, 1 << 15
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
    if any(len(name) > _LONGEST_NAME for name in tensors):
        raise CheckpointError(f"{path} has a tensor with an endless name; download it again")
    return GGUFFile(path, reader.metadata, tensors)


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


def parts_of(path: Path) -> list[Path]:
    """The files beside ``path`` that by their names are parts of its model, itself included."""
    name = _PART.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    parts = (_path_of_part(path, name, number) for number in range(count))
    return [part for part in parts if part.is_file()]


def _path_of_part(path: Path, name: re.Match[str], number: int) -> Path:
    end = f"-of-{name['count']}{name['suffix']}"
    return path.with_name(f"{name['model']}-{number + 1:05d}{end}")


def _paths_of_parts(path: Path, count: int) -> list[Path]:
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, and its name does not say how the others are called; "
            f"download all of them again, as MODEL-00001-of-{count:05d}.gguf and so on, or join "
            "them with llama.cpp's llama-gguf-split --merge"
        )
    parts = [_path_of_part(path, name, number) for number in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} parts, of which {len(missing)} are not beside it: "
            f"{', '.join(missing[:5])}; download them into that directory"
        )
    return parts


class _Reader(GGUFReader):
    """The package's reader, bounded, and with ``metadata`` as Python values.

    The package makes two arrays for every string of a vocabulary and one for every number of a
    list, as many as the file says, whose counts may be anything.
    """

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, Any] = {}
        self._values = 0
        super().__init__(path)

    def _get(
        self,
        offset: int,
        dtype: DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> NDArray[Any]:
        if self.byte_order == "S":
            raise ValueError("its byte order is not this machine's")
        # Unlike slices, this refuses to reach past the end of the file.
        return np.frombuffer(self.data, dtype, int(count), int(offset))

    def _build_fields(self, offs: int, count: int) -> int:
        for _ in range(int(count)):
            name, offs = self._string(offs)
            kind, offs = self._number(offs, np.uint32)
            if name in self.metadata:
                raise ValueError(f"{name:.80} stands there twice")
            start = offs
            self.metadata[name], offs = self._value(offs, GGUFValueType(kind))
            if name == _ALIGNMENT:
                parts = [self._get(start, np.uint32)]
                self.fields[name] = ReaderField(start, name, parts, [0], [GGUFValueType(kind)])
        return offs

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[ReaderField]]:
        if count > _MOST_TENSORS:
            raise ValueError(f"it says that it has {count} tensors")
        return super()._build_tensor_info(offs, int(count))

    def _value(self, offs: int, kind: GGUFValueType) -> tuple[Any, int]:
        """A value, and where the next begins."""
        if kind == GGUFValueType.STRING:
            return self._string(offs)
        if kind != GGUFValueType.ARRAY:
            return self._number(offs, self.gguf_scalar_to_np[kind])
        item, offs = self._number(offs, np.uint32)
        count, offs = self._number(offs, np.uint64)
        self._account(offs, count)
        if item != GGUFValueType.STRING:
            # Of an array of arrays there is no such type.
            numbers = self._get(offs, self.gguf_scalar_to_np[GGUFValueType(item)], count)
            return numbers.tolist(), offs + numbers.nbytes
        strings = []
        for _ in range(count):
            string, offs = self._string(offs)
            strings.append(string)
        return strings, offs

    def _number(self, offs: int, dtype: type[np.generic]) -> tuple[Any, int]:
        value = self._get(offs, dtype)
        return value.item(), offs + value.nbytes

    def _string(self, offs: int) -> tuple[str, int]:
        length, offs = self._number(offs, np.uint64)
        self._account(offs + length, 1)
        return self._get(offs, np.uint8, length).tobytes().decode("utf-8"), offs + length

    def _account(self, end: int, values: int) -> None:
        """Refuse metadata that no model has, before anything is made of it."""
        self._values += values
        if self._values > _MOST_VALUES or end > _MOST_BYTES:
            raise ValueError(f"its metadata has more than {self._values} values or {end} bytes")
