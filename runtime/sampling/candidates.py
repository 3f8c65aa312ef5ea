"""The largest of a row of logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def largest(values: Floats, k: int) -> Ids:
    """Indices of the ``k`` largest values and of ties with the k-th, largest first, ties by index.

    -inf never counts as a value, so fewer can come back. The k-th largest of the maxima of
    disjoint groups is a lower bound of the k-th largest value; finding the few values above it
    costs two passes over the row, about a tenth of a partition of the whole.
    """
    size = len(values)
    groups = max(8 * k, 512)
    if groups < size:
        depth = size // groups
        groups = size // depth
        maxima = values[: depth * groups].reshape(depth, groups).max(axis=0)
    else:
        maxima = values
    bound = np.partition(maxima, len(maxima) - k)[len(maxima) - k] if k < len(maxima) else -np.inf
    found = np.flatnonzero(values >= bound) if bound > -np.inf else np.flatnonzero(values > bound)
    found = found[np.argsort(-values[found], kind="stable")]
    if len(found) <= k:
        return found
    kth = values[found[k - 1]]
    return found[: np.searchsorted(-values[found], -kth, side="right")]
