"""Streams an engine's weights into one safetensors file, a weight at a time.

The format (8 bytes of header length, a JSON header, the data) is that of the safetensors project;
its library writes only tensors that are all in memory, and an engine may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.program import StoredTensor, StoredWeight
from slipstream.errors import BuildError

ALIGNMENT = 64  # a cache line; kernels read weights where the file is mapped
_NAMES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT32: "I32",
}


def write_weights(
    path: Path, weights: Sequence[StoredWeight], progress: Callable[[int], None]
) -> dict[str, tuple[int, int]]:
    """Write every weight and return the place of each part in the file: name -> (offset, bytes).

    ``progress`` is told the bytes of each weight as it is written. Peak memory is one weight's.
    """
    ordered = sorted(weights, key=_is_unaligned)
    header, places = _layout(part for weight in ordered for part in weight.parts)
    with path.open("wb") as file:
        file.write(header)
        for weight in ordered:
            for part, array in zip(weight.parts, weight.load(), strict=True):
                file.write(_checked_bytes(part, array))
                progress(part.nbytes)
    return places


def _is_unaligned(weight: StoredWeight) -> bool:
    # safetensors allows no holes, so what would break the alignment of its successors goes last.
    return any(part.nbytes % ALIGNMENT for part in weight.parts)


def _layout(parts: Iterable[StoredTensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    entries: dict[str, object] = {"__metadata__": {"format": "slipstream"}}
    spans: dict[str, tuple[int, int]] = {}
    offset = 0
    for part in parts:
        end = offset + part.nbytes
        entries[part.name] = {
            "dtype": _NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        spans[part.name] = (offset, part.nbytes)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: (start + offset, size) for name, (offset, size) in spans.items()}


def _checked_bytes(part: StoredTensor, array: NDArray[np.generic]) -> memoryview:
    if array.shape != part.shape or array.dtype != part.dtype.numpy():
        raise BuildError(
            f"weight {part.name} was declared {part.dtype.name} {part.shape} but holds "
            f"{array.dtype} {array.shape}; "
            "the checkpoint contradicts its own metadata: download it again"
        )
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
