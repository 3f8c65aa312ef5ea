"""The compiled kernels of Linear and Embedding, called without a session."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.targets.cpu.packed import format_attributes
from slipstream.plugins import linear as operators
from slipstream.plugins import native
from slipstream.plugins.linear.cpu.packing import packed_size
from slipstream.weights.tensor import WeightFormat

Floats = NDArray[np.float32]
Packed = dict[str, Any]


def packed_weight(blob: NDArray[np.uint8], fmt: WeightFormat, gated: bool = False) -> Packed:
    """What a call is told of a blob made by ``pack``."""
    assert blob.size == packed_size(fmt, gated)
    n, k = fmt.shape
    sizes = {"in_features": k, "out_features": n, "gated": int(gated)}
    return {"weight": blob, **sizes, **format_attributes(fmt)}


def linear(
    x: Floats, weight: Packed, isa: str, *, threads: int = 2, **options: Floats | float | None
) -> Floats:
    """``reference.linear`` by the kernel of one instruction set."""
    (y,) = native.call(operators.SPEC, {"x": x, **weight, **options}, isa, threads)
    return y


def linear_into(y: Floats, x: Floats, weight: Packed, isa: str, residual: Floats) -> None:
    """The same into an array that is there."""
    values = {"x": x, "residual": residual, **weight}
    native.run(operators.SPEC, native.arguments(operators.SPEC, values, {"y": y}), isa, threads=2)


def embedding(ids: NDArray[np.int32], weight: Packed, isa: str) -> Floats:
    """``reference.embedding`` by the kernel of one instruction set."""
    values = {"token_ids": ids, **weight}
    (y,) = native.call(operators.EMBEDDING_SPEC, values, isa, threads=2)
    return y
