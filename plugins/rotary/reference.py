"""What RotaryAngles computes, in NumPy."""

import numpy as np
from numpy.typing import NDArray

Angles = NDArray[np.float32]


def rotary_angles(
    positions: NDArray[np.int32], inv_freq: Angles, factor: float = 1.0
) -> tuple[Angles, Angles]:
    """Scaled cos and sin, float32 ``[T, R]``, of ``positions[T] * inv_freq[R]``.

    The angle is a float32 product, as in transformers, so that engines turn as models were trained;
    its cosine and sine are exact.
    """
    angles = (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)
    return (
        np.asarray(factor * np.cos(angles), np.float32),
        np.asarray(factor * np.sin(angles), np.float32),
    )
