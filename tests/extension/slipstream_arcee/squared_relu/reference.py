"""What SquaredRelu computes, in NumPy."""

import numpy as np
from numpy.typing import NDArray


def squared_relu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """max(x, 0)² of ``[T, W]``, float32 (So et al., arXiv 2109.08668)."""
    return np.asarray(np.maximum(x.astype(np.float64), 0) ** 2, np.float32)
