"""SmoothQuant: part of the range of activations moved into the weights that read them.

Xiao et al., 2022 (arXiv 2211.10438). Scales ``max|x|^alpha / max|w|^(1 - alpha)``, with the alpha
that rounds some of the inputs best, and none where none of them helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slipstream.quantize.activations import round_int8
from slipstream.quantize.algorithms.awq import Scaling
from slipstream.quantize.statistics import Inputs

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7)


def smoothing_scales(
    weights: Sequence[Tensor], inputs: Inputs, tied: Callable[[Tensor], Tensor]
) -> Scaling:
    """Scales ``[K]`` for weights ``[N, K]`` that read one x, both rounded to int8.

    ``tied`` makes channels equal that must share a scale.
    """
    x = tied(inputs.largest)
    w = tied(torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0))
    best = Scaling(0.0, torch.ones_like(x))
    if not bool((x > 0).any()):
        return best
    x = x.clamp(min=1e-5 * float(x.max()))
    w = w.clamp(min=1e-5 * float(w.max().clamp(min=1e-30)))
    least = _error(weights, inputs.sample, best.scales)
    for alpha in _ALPHAS:
        scales = x**alpha / w ** (1 - alpha)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = _error(weights, inputs.sample, scales)
        if error < least:
            best, least = Scaling(alpha, scales), error
    return best


def _error(weights: Sequence[Tensor], sample: Tensor, scales: Tensor) -> float:
    """Sum over weights of the relative error of their products with the rounded sample."""
    x = sample / scales
    rounded = round_int8(x, x.abs().amax(dim=-1, keepdim=True))
    total = 0.0
    for weight in weights:
        scaled = weight * scales
        low = round_int8(scaled, scaled.abs().amax(dim=-1, keepdim=True))
        exact = sample @ weight.t()
        error = (rounded @ low.t()).sub_(exact).square_().sum()
        total += float(error / exact.square().sum().clamp(min=1e-30))
    return total
