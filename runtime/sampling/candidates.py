"""Which tokens of one row survive top-k, top-p and min-p, and one draw among them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.sampling.params import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_BLOCK = 256
_BELOW_ONE = math.nextafter(1.0, 0.0)


def largest(values: Floats, k: int) -> Ids:
    """Indices of the ``k`` largest values and of ties with the k-th, largest first, ties by index.

    -inf never counts as a value, so fewer can come back. The k-th largest of the maxima of
    disjoint groups is a lower bound of the k-th largest value; finding the few values above it
    costs two passes over the row, about a tenth of a partition of the whole.
    """
    size = len(values)
    groups = max(8 * k, 512)
    if groups < size:
        depth = size // groups
        groups = size // depth
        maxima = values[: depth * groups].reshape(depth, groups).max(axis=0)
    else:
        maxima = values
    bound = np.partition(maxima, len(maxima) - k)[len(maxima) - k] if k < len(maxima) else -np.inf
    found = np.flatnonzero(values >= bound) if bound > -np.inf else np.flatnonzero(values > bound)
    found = found[np.argsort(-values[found], kind="stable")]
    if len(found) <= k:
        return found
    kth = values[found[k - 1]]
    return found[: np.searchsorted(-values[found], -kth, side="right")]


def draw_token(logits: Floats, top: np.float32, params: SamplingParams, uniform: float) -> int:
    """One token from ``logits[V]`` with finite maximum ``top``, for a ``uniform`` in [0, 1).

    Temperature, then top-k, then top-p of what is left, then min-p, then the inverse of the
    cumulative distribution. Cost per row is near one ``exp`` over the vocabulary, and much less
    with top-k or min-p alone.
    """
    scale = 1 / params.temperature
    if 0 < params.top_k < len(logits):
        ids = largest(logits, params.top_k)
        weights = _weights(logits[ids], top, scale)
        if params.top_p < 1:
            weights = weights[: _nucleus_size(weights, params.top_p * float(weights.sum()))]
    elif params.top_p < 1:
        weights = _weights(logits, top, scale)
        ids = nucleus(weights, params.top_p)
        weights = weights[ids]
    elif params.min_p > 0:
        # The likeliest token has weight 1, so this is min-p already; below it is applied exactly.
        ids = np.flatnonzero(
            logits >= float(top) + 1.01 * math.log(params.min_p) * params.temperature - 1e-3
        )
        weights = _weights(logits[ids], top, scale)
    else:
        return _pick_in_blocks(_weights(logits, top, scale), uniform)
    if params.min_p > 0:
        weights = np.where(weights >= params.min_p, weights, np.float32(0))
    return int(ids[_pick(weights, uniform)])


def _weights(logits: Floats, top: np.float32, scale: float) -> Floats:
    """Probabilities up to a common factor; the likeliest gets 1."""
    weights = logits - top
    weights *= scale
    np.exp(weights, out=weights)
    return weights


def nucleus(weights: Floats, top_p: float) -> Ids:
    """Fewest and likeliest tokens whose share of ``weights[V]`` reaches ``top_p``, in any order.

    They are few as a rule, so a few are sorted first.
    """
    mass = top_p * float(weights.sum())
    for k in (128, 2048):
        if 8 * k > len(weights):
            break
        ids = largest(weights, k)
        if float(weights[ids].sum(dtype=np.float64)) >= mass:
            return ids[: _nucleus_size(weights[ids], mass)]
    # Sorting values alone is several times faster than sorting indices; ties go to the lowest ids.
    descending = np.sort(weights)[::-1]
    size = min(_nucleus_size(descending, mass), len(weights))
    least = descending[size - 1]
    above = np.flatnonzero(weights > least)
    equal = np.flatnonzero(weights == least)
    return np.concatenate([above, equal[: size - len(above)]])


def _nucleus_size(sorted_weights: Floats, mass: float) -> int:
    cumulative = np.cumsum(sorted_weights, dtype=np.float64)
    return int(np.searchsorted(cumulative, mass, side="left")) + 1


def _pick(weights: Floats, uniform: float) -> int:
    # uniform < 1 keeps the product below the total, and "right" steps over tokens of weight zero.
    cumulative = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def _pick_in_blocks(weights: Floats, uniform: float) -> int:
    """``_pick`` over a whole vocabulary: a running sum over block sums, then inside one block."""
    starts = np.arange(0, len(weights), _BLOCK)
    cumulative = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    target = uniform * cumulative[-1]
    block = int(np.searchsorted(cumulative, target, side="right"))
    below = cumulative[block - 1] if block else 0.0
    inside = min(float((target - below) / (cumulative[block] - below)), _BELOW_ONE)
    start = block * _BLOCK
    return start + _pick(weights[start : start + _BLOCK], inside)
