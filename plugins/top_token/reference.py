"""What the kernel of TopToken computes, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def top_token(
    logits: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token and logit of each row; see the operator."""
    peaks = logits.max(axis=1)  # NaN where there is one
    tokens = np.where(np.isfinite(peaks), logits.argmax(axis=1), -1)
    return tokens.astype(np.int32), peaks
