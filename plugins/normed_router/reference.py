"""What NormedRouter computes, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins.rms_norm.reference import rms_norm
from slipstream.plugins.router.reference import router
from slipstream.weights.tensor import QuantTensor

Floats = NDArray[np.float32]


def normed_router(
    x: Floats,
    weight: QuantTensor,
    norm_weight: Floats,
    bias: Floats | None = None,
    correction: Floats | None = None,
    *,
    norm_eps: float,
    **choice: Any,  # noqa: ANN401 - attributes of Router
) -> tuple[Floats, NDArray[np.int32], Floats]:
    """The norm of x, float32 ``[T, K]``, and the experts that ``router`` chooses for it.

    x ``[T, K]``, the weight ``[E, K]``, norm_weight ``[K]``; bias and correction ``[E]``. Sums are
    in float64.
    """
    y = rms_norm(x, norm_weight, norm_eps)
    logits: NDArray[Any] = y.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    if bias is not None:
        logits = logits + bias
    return y, *router(logits.astype(np.float32), correction, **choice)
