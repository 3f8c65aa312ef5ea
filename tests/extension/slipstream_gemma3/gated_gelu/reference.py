"""What GatedGELU computes, in NumPy."""

import numpy as np
from numpy.typing import NDArray


def gated_gelu(gate_up: NDArray[np.float32]) -> NDArray[np.float32]:
    """gelu(gate) * up of ``[T, 2*W]``: float32 ``[T, W]``.

    The tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415).
    """
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return np.asarray(0.5 * gate * (1 + np.tanh(inner)) * up, np.float32)
