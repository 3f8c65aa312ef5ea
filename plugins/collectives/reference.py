"""What AllReduce and AllGather compute, in NumPy: of x of every rank, what each of them gets."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
