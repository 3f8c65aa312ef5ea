"""Search of the range of each group of weights: clipping a few large ones can serve the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.quantize.algorithms.grid import Grid, range_grid, weight_range
from slipstream.quantize.options import Scheme

# Fractions of both ends that are tried first, then steps of each end by itself, twice.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
_STEPS = (-0.1, -0.05, 0.05, 0.1)
_ROUNDS = 2
# Elements worked on at once, so that they stay in the cache.
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Clipped:
    """A grid, and the mean fraction of the range of its groups that it covers."""

    grid: Grid
    kept: float


def search_range(weight: Tensor, importance: Tensor, scheme: Scheme, name: str) -> Clipped:
    """The ranges that give the least rounding error of a weight ``[N, K]``.

    The squared error of column k counts ``importance[k]``: the diagonal of the Gram matrix of the
    inputs. A group that no input reaches keeps its whole range.
    """
    step = max(1, _CHUNK // weight.shape[1])
    found = [_search(rows, importance, scheme, name) for rows in torch.split(weight, step)]
    grids = [grid for grid, _ in found]
    grid = Grid(
        torch.cat([grid.scale for grid in grids]),
        torch.cat([grid.zero for grid in grids]),
        scheme.bits,
        scheme.group,
    )
    return Clipped(grid, float(torch.cat([kept for _, kept in found]).mean()))


def _search(weight: Tensor, importance: Tensor, scheme: Scheme, name: str) -> tuple[Grid, Tensor]:
    low, high = weight_range(weight, scheme.group)
    groups = weight.reshape(len(weight), -1, scheme.group)
    counts = importance.reshape(-1, scheme.group)
    ends = torch.ones_like(low), torch.ones_like(high)
    best = range_grid(low, high, scheme, name)
    least = _error(groups, counts, best)

    def attempt(below: Tensor, above: Tensor) -> None:
        nonlocal ends, best, least
        grid = range_grid(low * below, high * above, scheme, name)
        error = _error(groups, counts, grid)
        won = error < least
        least = torch.where(won, error, least)
        ends = torch.where(won, below, ends[0]), torch.where(won, above, ends[1])
        scale, zero = (
            torch.where(won, grid.scale, best.scale),
            torch.where(won, grid.zero, best.zero),
        )
        best = Grid(scale, zero, scheme.bits, scheme.group)

    for fraction in _SHRINK[1:]:
        attempt(torch.full_like(low, fraction), torch.full_like(high, fraction))
    for _ in range(0 if scheme.symmetric else _ROUNDS):
        for change in _STEPS:
            attempt((ends[0] + change).clamp_(max=1), ends[1])
        for change in _STEPS:
            attempt(ends[0], (ends[1] + change).clamp_(max=1))
    width = high - low
    kept = (high * ends[1] - low * ends[0]) / torch.where(width > 0, width, 1)
    return best, torch.where(width > 0, kept, 1)


def _error(groups: Tensor, counts: Tensor, grid: Grid) -> Tensor:
    """Weighted squared error of every group: ``[N, G]``."""
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    inverse = 1 / torch.where(scale == 0, torch.inf, scale)
    codes = (groups * inverse).round_().add_(zero).clamp_(0, grid.top)
    error = codes.sub_(zero).mul_(scale).sub_(groups).square_()
    return error.mul_(counts).sum(-1)
