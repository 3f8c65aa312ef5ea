"""What the kernel of DrawTokens computes, in NumPy: every token is sorted and weighed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Ids = NDArray[np.intp]

MOST_SORTED = 2048  # tokens of a nucleus that a draw goes through from the likeliest down


def draw_tokens(
    logits: Floats,
    row: Ints,
    temperature: Floats,
    top_k: Ints,
    top_p: Floats,
    min_p: Floats,
    uniform: NDArray[np.int64],
) -> tuple[Ints, Floats]:
    """The token and the largest logit of each draw; see the operator."""
    peaks = logits.max(axis=1)[row]  # NaN where there is one
    tokens = np.full(len(row), -1, np.int32)
    for i in np.flatnonzero(np.isfinite(peaks)):
        values, scale = logits[row[i]], float(temperature[i])
        if scale == 0:
            tokens[i] = values.argmax()
            continue
        weights = np.exp((values - peaks[i]).astype(np.float64) / scale)
        ids = _candidates(values, weights, int(top_k[i]), float(top_p[i]))
        kept = np.where(weights[ids] >= min_p[i], weights[ids], 0.0)
        tokens[i] = ids[_pick(kept, float(uniform[i]) * 2.0**-53)]
    return tokens, peaks


def _candidates(values: Floats, weights: NDArray[np.float64], top_k: int, top_p: float) -> Ids:
    """What top-k and top-p leave, in the order in which a draw goes through it."""
    few = 0 < top_k < len(values)
    if not few and top_p >= 1:
        return np.arange(len(values))
    ids = np.argsort(-values, kind="stable")
    if few:
        least = values[ids[top_k - 1]]
        ids = ids[(values[ids] >= least) & (values[ids] > -np.inf)]
    if top_p < 1:
        cumulative = np.cumsum(weights[ids])
        ids = ids[: np.searchsorted(cumulative, top_p * cumulative[-1], side="left") + 1]
    if few or len(ids) <= MOST_SORTED:
        return ids
    ties = weights[ids] == weights[ids[-1]]
    return np.concatenate([np.sort(ids[~ties]), ids[ties]])


def _pick(weights: NDArray[np.float64], uniform: float) -> int:
    # uniform < 1 keeps the product below the total, and "right" steps over tokens of weight zero.
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
