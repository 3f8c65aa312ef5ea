"""What GatedActivation computes, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins.gated_mlp import GATES

Floats = NDArray[Any]
_ALPHA, _LIMIT = 1.702, 7.0


def gated(gate: Floats, up: Floats, kind: int = GATES["silu"]) -> Floats:
    """What a gate lets through of ``up``, of the same shape and dtype; ``kind`` of ``GATES``.

    The tanh form of GELU is that of Hendrycks and Gimpel (arXiv 1606.08415); the clamped gate that
    of gpt-oss.
    """
    if kind == GATES["gelu_tanh"]:
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        return np.asarray(0.5 * gate * (1 + np.tanh(inner)) * up)
    if kind == GATES["clamped"]:
        gate, up = np.minimum(gate, _LIMIT), np.clip(up, -_LIMIT, _LIMIT)
        return np.asarray(gate / (1 + np.exp(-_ALPHA * gate)) * (up + 1))
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def gated_activation(gate_up: NDArray[np.float32], gate: int = GATES["silu"]) -> Floats:
    """``gated`` of ``[T, 2*W]``: float32 ``[T, W]``."""
    gates, ups = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return np.asarray(gated(gates, ups, gate), np.float32)
