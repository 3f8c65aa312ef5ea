"""What FusedAddRMSNorm computes, in NumPy."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def rms_norm(x: Rows, weight: Rows, norm_eps: float) -> Rows:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich, 2019): float32,
    x's shape."""
    wide = x.astype(np.float64)
    scale = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + norm_eps)
    return np.asarray(wide * scale * weight, np.float32)


def fused_add_rms_norm(x: Rows, residual: Rows, weight: Rows, norm_eps: float) -> tuple[Rows, Rows]:
    """The norm of x + residual, and the sum: both float32 ``[T, H]``."""
    total = x + residual
    return rms_norm(total, weight, norm_eps), total
