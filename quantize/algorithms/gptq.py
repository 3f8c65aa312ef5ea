"""GPTQ: rounding column by column, each error made up for by the columns that are still to come.

Frantar et al., 2022 (arXiv 2210.17323), with columns in the order of their importance and the grids
of groups fixed beforehand, so that the codes are stored in the order of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.quantize.algorithms.grid import Grid, usable

DAMPINGS = (0.01, 0.1, 1.0)
_BLOCK = 64  # columns whose errors are handed on at once


@dataclass(frozen=True, slots=True, eq=False)
class Compensation:
    """How the error of a column is spread over later ones; one for all weights that read one x.

    order    int64 ``[K]``: columns, most important first.
    factor   upper triangular ``[K, K]``, in that order: U with UᵀU = (H + damping)⁻¹.
    damping  what was added to the diagonal of H, as a fraction of its mean.
    """

    order: Tensor
    factor: Tensor
    damping: float


def compensation(gram: Tensor) -> Compensation | None:
    """From the Gram matrix ``[K, K]`` of inputs; None if even the heaviest damping leaves it
    without a Cholesky factor."""
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True)
    ordered = gram[order][:, order]
    for damping in DAMPINGS:
        damped = ordered.clone()
        damped.diagonal().add_(damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.isfinite().all()):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(upper.isfinite().all()):
                return Compensation(order, upper, damping)
    return None


def compensated_codes(weight: Tensor, grid: Grid, way: Compensation) -> Tensor:
    """The codes of a weight ``[N, K]`` on a grid, as float32 ``[N, K]``."""
    # Columns are rows here, which makes them contiguous.
    left = weight.t()[way.order]
    scales, zeros = (x.t()[way.order] for x in grid.spread())
    codes = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        block = slice(start, stop)
        errors = _round_block(
            left[block],
            scales[block],
            zeros[block],
            way.factor[block, block],
            codes[block],
            grid.top,
        )
        left[stop:].addmm_(way.factor[block, stop:].t(), errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[way.order] = codes
    return unordered.t().contiguous()


def _round_block(
    left: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, codes: Tensor, top: int
) -> Tensor:
    """Fills ``codes``; the errors ``[columns, N]`` to hand on to the columns after the block."""
    errors = torch.empty_like(left)
    inverses = 1 / usable(scales)
    for i in range(len(left)):
        torch.mul(left[i], inverses[i], out=codes[i])
        codes[i].round_().add_(zeros[i]).clamp_(0, top)
        error = torch.addcmul(left[i], codes[i] - zeros[i], scales[i], value=-1)
        torch.div(error, factor[i, i], out=errors[i])
        left[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors
