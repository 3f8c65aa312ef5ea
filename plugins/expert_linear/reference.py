"""What ExpertLinear computes, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins.gated_mlp.reference import gated as gated_activation
from slipstream.plugins.linear.reference import round_activations
from slipstream.weights.tensor import Activation, QuantTensor

Floats = NDArray[np.float32]


def expert_linear(  # noqa: PLR0913 - what is fused
    x: Floats,
    weight: QuantTensor,
    expert_ids: NDArray[np.int32],
    expert_weights: Floats | None = None,
    *,
    bias: Floats | None = None,
    residual: Floats | None = None,
    experts: int,
    reduce: int = 0,
    gated: int = 0,
    gate: int = 0,
    activation: Activation | None = None,
) -> Floats:
    """Products of rows with the weights of their experts.

    x ``[T, K]``, or with ``reduce`` ``[T * top_k, K]``; the weight ``[experts * N, K]``; expert_ids
    ``[T, top_k]``; bias ``[experts * N]``. The result is ``[T * top_k, N]`` (``N / 2`` when gated),
    or with ``reduce`` ``[T, N]``: products times expert_weights ``[T, top_k]``, added up, plus the
    residual. ``activation`` is by default that of the weight's format. Sums are in float64.
    """
    tokens, top_k = expert_ids.shape
    rounded = round_activations(x, weight, activation or weight.format.activation)
    rows = rounded if reduce else np.repeat(rounded, top_k, axis=0)
    matrices = weight.dequantize().astype(np.float64).reshape(experts, -1, x.shape[1])
    places = expert_ids.reshape(-1)
    y: NDArray[Any] = np.einsum("rk,rnk->rn", rows, matrices[places])
    if bias is not None:
        y = y + bias.reshape(experts, -1)[places]
    if gated:
        gates, ups = np.split(y, 2, axis=1)
        y = gated_activation(gates, ups, gate)
    if reduce:
        assert expert_weights is not None
        y = (y.reshape(tokens, top_k, -1) * expert_weights[:, :, None]).sum(axis=1)
    if residual is not None:
        y = y + residual
    return np.asarray(y, np.float32)
