"""The safetensors container: 8 bytes of length, a JSON header, then raw little-endian arrays.

Read and written here rather than by the safetensors package because its NumPy side has no bfloat16,
hides the offsets that lazy maps need, and writes only what is all in memory. Format:
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from slipstream.errors import CheckpointError
from slipstream.weights.json import MAX_BYTES, Fields, Origin, parse, shortened
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F64": np.dtype(np.float64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "I8": np.dtype(np.int8),
        "I16": np.dtype(np.int16),
        "I32": np.dtype(np.int32),
        "I64": np.dtype(np.int64),
        "U8": np.dtype(np.uint8),
        "U16": np.dtype(np.uint16),
        "U32": np.dtype(np.uint32),
        "U64": np.dtype(np.uint64),
        "BOOL": np.dtype(np.bool_),
    }
)
_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
# Types that a weight has when it is not quantized.
DENSE = ("F32", "F16", "BF16")
_LENGTH = 8  # bytes before the header
_METADATA = "__metadata__"
_LONGEST = 32  # axes of a shape, as in NumPy; a type has fewer characters, a name 16 times as many
_CHUNK = 1 << 24  # bytes written at once


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``dtype`` as the file spells it, ``offset`` and ``size`` in bytes.

    ``strides`` are the bytes from one element of each axis to the next, of a part of a tensor of
    the file; None for a whole one, whose rows follow each other.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    strides: tuple[int, ...] | None = None

    def numpy_dtype(self) -> np.dtype[Any]:
        """The element type; CheckpointError for one that NumPy cannot hold."""
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} has type {self.dtype}; only {', '.join(DTYPES)} "
                "can be read: convert the checkpoint to bfloat16"
            )
        return DTYPES[self.dtype]

    def dense(self) -> LazyTensor:
        """The weight, not yet read; CheckpointError when it is of no type that weights have."""
        if self.dtype not in DENSE:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} has type {self.dtype}; only {', '.join(DENSE)} "
                "can be read where config.json describes no quantization: use the config.json that "
                "belongs to the weights, or convert them to bfloat16"
            )
        form = WeightFormat(self.shape, "dense", self.numpy_dtype().name)
        return LazyTensor(self.name, form, lambda: QuantTensor(self.name, form, self.map()))

    def map(self) -> NDArray[np.generic]:
        """The values, mapped from the file."""
        if self.strides is None:
            return map_array(self.path, self.numpy_dtype(), self.offset, self.shape)
        data = map_array(self.path, np.uint8, self.offset, (self.size,))
        return np.ndarray(self.shape, self.numpy_dtype(), data.data, strides=self.strides)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array that is to be written, before its data exists."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, array: NDArray[np.generic]) -> ArraySpec:
        """That of an array."""
        return cls(name, array.dtype, array.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def map_array(
    path: Path, dtype: DTypeLike, offset: int, shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """A read-only array over ``path`` from byte ``offset`` on; unmapped when it is let go.

    Each array has a map of its own, so that a build that drops a layer also drops its pages.
    """
    if 0 in shape:
        return np.empty(shape, dtype)
    try:
        return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read at byte {offset} ({error}); it was moved or changed during "
            "the build: put it back and build again"
        ) from error


def read_header(path: Path, origin: Origin | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a file, checked against the size of the file; also those that
    ``safetensors.torch.save_model`` left out, because they share the data of another one, and that
    it names in the metadata.

    ``origin`` says which error to raise, by default CheckpointError.
    """
    origin = origin or Origin(path, "download the checkpoint again")
    header, start, size = _header(path, origin)
    fields = Fields(header, origin)
    tensors = {name: _stored(path, name, fields, start) for name in header if name != _METADATA}
    end = max((t.offset + t.size for t in tensors.values()), default=start)
    if end > size:
        raise origin.refusal(f"is truncated: it has {size} bytes and its tensors need {end}")
    metadata = header.get(_METADATA)
    for name, kept in metadata.items() if isinstance(metadata, dict) else ():
        if isinstance(kept, str) and kept in tensors and name not in tensors:
            tensors[name] = replace(tensors[kept], name=name)
    return tensors


def _header(path: Path, origin: Origin) -> tuple[dict[str, object], int, int]:
    """The header, where the data starts, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            start = _LENGTH + length
            if not _LENGTH + 2 <= start <= min(size, _LENGTH + MAX_BYTES):
                raise origin.refusal(
                    f"has {size} bytes and a header that ends at byte {start}: it is truncated or "
                    "not a safetensors file"
                )
            text = file.read(length)
    except (OSError, ValueError) as error:
        raise origin.refusal(f"cannot be read ({error})") from error
    damaged = Origin(f"{origin.file} has a damaged header: it", origin.remedy, origin.error)
    header = parse(text, damaged)
    if not isinstance(header, dict):
        raise damaged.refusal(f"is no object but {shortened(header)}")
    return header, start, size


def _stored(path: Path, name: str, header: Fields, start: int) -> StoredTensor:
    origin = header.origin
    try:
        entry = header.fields(name)
        dtype, shape = entry.text("dtype"), entry.integers("shape")
        begin, end = entry.integers("data_offsets")
        if max(len(name) / 16, len(dtype), len(shape)) > _LONGEST:
            raise ValueError("its name, type or shape is longer than any")
    except (origin.error, ValueError) as error:
        raise origin.error(
            f"{origin.file}: the header's entry for {name:.80} is "
            f"{shortened(header.values[name])}, which is damaged; {origin.remedy}"
        ) from error
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if begin > end or end - begin != expected:
        raise origin.error(
            f"{origin.file}: tensor {name} of type {dtype} and shape {list(shape)} should take "
            f"{shortened(expected)} bytes, but its offsets are {begin} to {end}; {origin.remedy}"
        )
    return StoredTensor(path, name, dtype, shape, start + begin, end - begin)


def encode_header(
    specs: Iterable[ArraySpec], metadata: Mapping[str, str], alignment: int = 8
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before the data of tensors in this order, a multiple of ``alignment``, and the
    place of each in the file: name -> (offset, bytes)."""
    entries: dict[str, object] = {_METADATA: dict(metadata)}
    spans: dict[str, tuple[int, int]] = {}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": _SPELLINGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        spans[spec.name] = (offset, spec.nbytes)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % alignment)
    header = len(text).to_bytes(_LENGTH, "little") + text
    return header, {name: (len(header) + begin, size) for name, (begin, size) in spans.items()}


def write_safetensors(
    path: Path, specs: Sequence[ArraySpec], arrays: Iterable[NDArray[np.generic]]
) -> None:
    """Writes ``arrays``, which come in the order of ``specs`` and are let go of one by one.

    The file is complete when this returns: its data has been handed to the disk.
    """
    header, _ = encode_header(specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for spec, array in zip(specs, arrays, strict=True):
            assert ArraySpec.of(spec.name, array) == spec, (spec, array.dtype, array.shape)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK].data)
        file.flush()
        os.fsync(file.fileno())


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Writes arrays by name."""
    write_safetensors(
        path, [ArraySpec.of(name, array) for name, array in arrays.items()], arrays.values()
    )
