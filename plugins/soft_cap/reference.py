"""What SoftCap computes, in NumPy."""

import numpy as np
from numpy.typing import NDArray


def soft_cap(x: NDArray[np.float32], cap: float) -> NDArray[np.float32]:
    """cap * tanh(x / cap), float32 ``[rows, columns]`` (Gemma 2, arXiv 2408.00118)."""
    return np.asarray(cap * np.tanh(x.astype(np.float64) / cap), np.float32)
