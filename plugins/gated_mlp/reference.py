"""What GatedActivation computes, in NumPy."""

import numpy as np
from numpy.typing import NDArray


def gated_activation(gate_up: NDArray[np.float32]) -> NDArray[np.float32]:
    """silu(gate) * up of ``[T, 2*W]``: float32 ``[T, W]``."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up, np.float32)
