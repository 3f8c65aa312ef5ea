"""AWQ: scales of channels that protect those which matter, found on the Gram matrix alone.

Lin et al., 2023 (arXiv 2306.00978). Instead of running the layer for every candidate, the error of
rounding is added up with the weight that each column's error has once later columns make up for it
as well as they can: 1 / (H⁻¹)ₖₖ, which is what GPTQ leaves of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.quantize.algorithms.gptq import Compensation
from slipstream.quantize.algorithms.grid import range_grid, weight_range
from slipstream.quantize.options import Scheme

_ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Scales ``[K]`` by which columns are multiplied and x divided; ``alpha`` 0 is none."""

    alpha: float
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """A weight ``[N, K]`` and how it will be rounded."""

    name: str
    weight: Tensor
    scheme: Scheme


def conditional_importance(gram: Tensor, way: Compensation | None) -> Tensor:
    """The part of each channel ``[K]`` that no other explains: 1 / (H⁻¹)ₖₖ; without a factor of H,
    its diagonal."""
    if way is None:
        return gram.diagonal().clone()
    inverse = torch.empty_like(gram[0])
    inverse[way.order] = way.factor.square().sum(dim=0)
    return 1 / inverse


def search_scales(
    linears: Sequence[Weighted], importance: Tensor, tied: Callable[[Tensor], Tensor]
) -> Scaling:
    """The exponent alpha, and scales ``sqrt(importance)^alpha / w^(1 - alpha)``, of least error for
    linears that read one x.

    w is the mean magnitude of a column within its groups; ``tied`` makes channels equal that must
    share a scale. alpha = 0, no scaling, is kept unless another wins.
    """
    activity = tied(importance).sqrt()
    if not bool((activity > 0).any()):
        return Scaling(0.0, torch.ones_like(activity))
    activity = activity.clamp(min=1e-6 * float(activity.max()))
    weight = tied(_column_magnitude(linears)).clamp(min=1e-6)
    best = Scaling(0.0, torch.ones_like(activity))
    least = _error(linears, importance, best.scales)
    for alpha in _ALPHAS[1:]:
        scales = activity**alpha / weight ** (1 - alpha)
        scales /= (scales.max() * scales.min()).sqrt()
        error = _error(linears, importance, scales)
        if error < least:
            best, least = Scaling(alpha, scales), error
    return best


def _column_magnitude(linears: Sequence[Weighted]) -> Tensor:
    """Mean over rows of |w| over the largest of its group: ``[K]``."""
    parts = []
    for linear in linears:
        groups = linear.weight.abs().reshape(len(linear.weight), -1, linear.scheme.group)
        largest = groups.amax(-1, keepdim=True)
        parts.append((groups / torch.where(largest > 0, largest, 1)).flatten(1).mean(0))
    return torch.stack(parts).mean(0)


def _error(linears: Sequence[Weighted], importance: Tensor, scales: Tensor) -> float:
    """Sum over linears of the relative error of rounding the scaled weights."""
    total = 0.0
    for linear in linears:
        scaled = linear.weight * scales
        grid = range_grid(*weight_range(scaled, linear.scheme.group), linear.scheme, linear.name)
        error = grid.decode(grid.codes(scaled)).sub_(scaled).div_(scales)
        size = linear.weight.square().sum(0) @ importance
        total += float(error.square_().sum(0) @ importance / size.clamp(min=1e-30))
    return total
