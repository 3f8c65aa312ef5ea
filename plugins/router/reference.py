"""What Router computes, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins.router import SCORINGS

Floats = NDArray[np.float32]
Choice = tuple[NDArray[np.int32], Floats]


def router(
    logits: Floats,
    correction: Floats | None = None,
    *,
    top_k: int,
    scoring: int = SCORINGS["softmax"],
    renormalize: int = 0,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> Choice:
    """Experts int32 and their weights float32, ``[T, top_k]``, of logits ``[T, E]``.

    ``scoring`` is one of ``SCORINGS``. Softmax routing is that of Shazeer et al. (arXiv
    1701.06538); sigmoid scores, corrections ``[E]`` and groups that of DeepSeek-V3 (arXiv
    2412.19437).
    """
    x = logits.astype(np.float64)
    if scoring == SCORINGS["sigmoid"]:
        scores = 1 / (1 + np.exp(-x))
    else:
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
    chosen_by = scores if correction is None else scores + correction.astype(np.float64)
    if groups > 1:
        chosen_by = _within_groups(chosen_by, groups, top_groups)
    ids = np.argsort(-chosen_by, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if renormalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return ids.astype(np.int32), (weights * scale).astype(np.float32)


def _within_groups(scores: NDArray[np.float64], groups: int, kept: int) -> NDArray[np.float64]:
    """Scores with those outside of the best groups at -infinity."""
    tokens, experts = scores.shape
    by_group = np.sort(scores.reshape(tokens, groups, experts // groups), axis=2)
    best = np.argsort(-by_group[:, :, -2:].sum(axis=2), axis=1, kind="stable")[:, :kept]
    inside = np.zeros((tokens, groups), bool)
    np.put_along_axis(inside, best, values=True, axis=1)
    return np.where(np.repeat(inside, experts // groups, axis=1), scores, -np.inf)
