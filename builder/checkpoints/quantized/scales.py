"""Scales by the shape they are stored in: who shares one, and as the array our format wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import CheckpointError
from slipstream.weights.safetensors import StoredTensor

# Bytes of scales that are powers of two: 2 ** (byte - 127).
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Grid:
    """A scale is shared by ``rows`` rows and ``group`` columns of a weight ``[N, K]``."""

    rows: int
    group: int

    def cells(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many scales there are along N and along K; the last ones may cover less."""
        n, k = shape
        return math.ceil(n / self.rows), math.ceil(k / self.group)


def scale_grid(scale: StoredTensor, shape: tuple[int, ...], expected: Sequence[Grid] = ()) -> Grid:
    """Who shares a scale of a weight ``[N, K]``.

    ``expected`` are the groups or blocks that the configuration names; where the tensor has another
    shape, it is one scale for all, one a row, or one an even part of a row. Raises CheckpointError
    when it is none of these.
    """
    n, k = shape
    found = tuple(size for size in scale.shape if size != 1)
    for grid in expected:
        if found == tuple(size for size in grid.cells(shape) if size != 1):
            return grid
    if math.prod(found) == 1 or (found == (n,) and scale.shape[0] == n):
        return Grid(1, k)
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == n else 0
    if 0 < groups <= k and k % groups == 0:
        return Grid(1, k // groups)
    raise CheckpointError(
        f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, which fits no grouping "
        f"of a weight {list(shape)}{_wanted(expected, shape)}; config.json and weights are of "
        "different models: download both again"
    )


def _wanted(expected: Sequence[Grid], shape: tuple[int, ...]) -> str:
    if not expected:
        return ""
    return f" (by the configuration it is {list(expected[0].cells(shape))})"


def spread(values: NDArray[np.generic], grid: Grid, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Stored numbers as ``[ceil(N/rows), ceil(K/group)]``; a single one is repeated."""
    cells = grid.cells(shape)
    if values.size == 1:
        return np.full(cells, values.reshape(()), values.dtype)
    return values.reshape(cells)


def scale_values(scale: StoredTensor) -> NDArray[np.generic]:
    """The numbers of a tensor of scales; bytes are powers of two."""
    values = scale.map()
    return values.view(_E8M0) if values.dtype == np.uint8 else values


def scale_type(scale: StoredTensor) -> str:
    """The dtype of ``scale_values``, as ``WeightFormat.dtype`` names it."""
    dtype: np.dtype[Any] = scale.numpy_dtype()
    return (_E8M0 if dtype == np.uint8 else dtype).name


def matrix_shape(weight: StoredTensor) -> tuple[int, int]:
    """The shape of a stored weight, which must be a matrix."""
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(
            f"{weight.path}: tensor {weight.name} has shape {list(weight.shape)}; a quantized "
            "weight is a matrix: pass another quantization of the model"
        )
    return weight.shape[0], weight.shape[1]


def one_number(tensor: StoredTensor) -> NDArray[np.float32]:
    """The only element of a tensor: float32 ``[1]``."""
    if math.prod(tensor.shape) != 1:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)} where one number "
            "belongs; download the checkpoint again"
        )
    return tensor.map().astype(np.float32).reshape(1)
