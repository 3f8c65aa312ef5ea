"""The safetensors container: a JSON header, then raw little-endian arrays.

Read here rather than by the safetensors package because its NumPy side has no bfloat16 and hides
the offsets that lazy maps need. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.base import map_array
from slipstream.errors import CheckpointError
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
# Types that a weight has when it is not quantized.
DENSE = ("F32", "F16", "BF16")
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``dtype`` as the file spells it, ``offset`` and ``size`` in bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

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
        return map_array(self.path, self.numpy_dtype(), self.offset, self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, checked against the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 10 <= start <= size:
                raise CheckpointError(
                    f"{path} has {size} bytes and a header that ends at byte {start}: it is "
                    f"truncated or not a safetensors file; {_AGAIN}"
                )
            header = dict(json.loads(file.read(start - 8)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); {_AGAIN}") from error
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    end = max((t.offset + t.size for t in tensors.values()), default=start)
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes and its tensors need {end}; {_AGAIN}"
        )
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's entry for {name} is {entry!r}, which is damaged; {_AGAIN}"
        ) from error
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if not 0 <= begin <= end or end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name} of type {dtype} and shape {list(shape)} should take {expected} "
            f"bytes, but its offsets are {begin} to {end}; {_AGAIN}"
        )
    return StoredTensor(path, name, dtype, shape, start + begin, end - begin)
