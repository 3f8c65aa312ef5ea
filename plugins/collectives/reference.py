"""What ranks compute together, in NumPy: of x of every rank, what each of them gets."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins.rms_norm.reference import fused_add_rms_norm

Matrix = NDArray[np.float32]


def all_reduce(x: Sequence[Matrix]) -> Matrix:
    """((x[0] + x[1]) + x[2]) + ..., float32 ``[rows, columns]``, rounded at every step."""
    total = x[0].copy()
    for each in x[1:]:
        total += each
    return total


def all_gather(x: Sequence[Matrix]) -> Matrix:
    """x[0] | x[1] | ..., float32 ``[rows, ranks * columns]``."""
    return np.concatenate(x, axis=1)


def all_reduce_add_rms_norm(
    x: Sequence[Matrix], residual: Matrix, weight: Matrix, norm_eps: float
) -> tuple[Matrix, Matrix]:
    """The norm of ``all_reduce(x) + residual``, and that sum: both float32 ``[T, H]``."""
    return fused_add_rms_norm(all_reduce(x), residual, weight, norm_eps)
