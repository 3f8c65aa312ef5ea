"""What the sampling kernels compute, in NumPy: the survivors of a row and one draw among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]
Words = NDArray[np.uint32]

_LOW = np.uint64(0xFFFFFFFF)


def survivors(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Mask:
    """Which tokens of ``logits[V]`` can be drawn: top-k, then top-p of what is left, then min-p.

    Ties with the last token of top-k or of the nucleus are kept.
    """
    values = logits.astype(np.float64)
    kept = values > -np.inf
    weights = np.exp((values - values.max()) / temperature)
    if 0 < top_k < len(values):
        kept &= values >= np.sort(values)[-top_k]
    if top_p < 1:
        ordered = np.sort(values[kept])[::-1]
        cumulative = np.cumsum(np.exp((ordered - ordered[0]) / temperature))
        last = np.searchsorted(cumulative, top_p * cumulative[-1], side="left")
        kept &= values >= ordered[last]
    kept &= weights >= min_p
    return kept


def philox(seed: int, position: int, count: int) -> Words:
    """``count`` words of Philox4x32-10, one a token: word ``id % 4`` of the block at counter
    ``(id // 4, position, 0, 0)`` under the 64 bits of ``seed`` as key."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    zeros = np.zeros_like(blocks)
    counter = [blocks, zeros + np.uint64(position), zeros, zeros]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first = counter[0] * np.uint64(0xD2511F53)
        second = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(keys[0]),
            second & _LOW,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(keys[1]),
            first & _LOW,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return np.stack(counter, axis=1).astype(np.uint32).ravel()[:count]


def scores(logits: NDArray[np.float32], temperature: float, seed: int, position: int) -> Doubles:
    """``(logit - peak) / temperature - log(E)`` of every token; the largest survivor is drawn."""
    uniforms = (philox(seed, position, len(logits)) + 0.5) * 2.0**-32
    values = logits.astype(np.float64)
    noisy: Doubles = (values - values.max()) / temperature - np.log(-np.log1p(-uniforms))
    return noisy


def draw(
    logits: NDArray[np.float32],
    seed: int,
    position: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """One token of ``logits[V]``, whose largest value is finite; ``temperature`` is not 0."""
    kept = survivors(logits, temperature, top_k, top_p, min_p)
    return int(np.where(kept, scores(logits, temperature, seed, position), -np.inf).argmax())
