"""Integer grids of groups of weights, and rounding to them, in torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.quantize.options import Scheme
from slipstream.weights.tensor import QuantTensor, numpy_dtype, pack_nibbles

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """What the codes of a weight ``[N, K]`` stand for: ``(q - zero) * scale``.

    ``scale`` float32 ``[N, K/group]``, a number that the stored type can hold; ``zero`` likewise,
    whole numbers in 0..2**bits - 1.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    @property
    def top(self) -> int:
        """The highest code."""
        return int(2**self.bits - 1)

    def spread(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every element: two ``[N, K]``."""
        return (
            self.scale.repeat_interleave(self.group, dim=1),
            self.zero.repeat_interleave(self.group, dim=1),
        )

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes, as float32 ``[N, K]``."""
        scale, zero = self.spread()
        return (weight / usable(scale)).round_().add_(zero).clamp_(0, self.top)

    def decode(self, codes: Tensor) -> Tensor:
        """The weight that codes ``[N, K]`` stand for."""
        scale, zero = self.spread()
        return (codes - zero).mul_(scale)


def usable(scale: Tensor) -> Tensor:
    """``scale`` to divide by: that of a group without a range is 0, and its codes are its zero."""
    return torch.where(scale.abs() >= torch.finfo(torch.float32).tiny, scale, torch.inf)


def range_grid(low: Tensor, high: Tensor, scheme: Scheme, name: str) -> Grid:
    """The grid of groups that reach from ``low`` to ``high``, both ``[N, K/group]``.

    Asymmetric ranges must contain 0, which stays exact. Symmetric ones give the end of larger
    magnitude the lowest code, so that a scale may be negative. Raises CheckpointError for a scale
    that the scheme's type cannot hold.
    """
    top, half = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        scale = stored(torch.where(-low >= high, low, high) / -half, scheme, name)
        return Grid(scale, torch.full_like(scale, half), scheme.bits, scheme.group)
    scale = stored(high / top - low / top, scheme, name)
    zero = (-low / usable(scale)).round_().clamp_(0, top)
    return Grid(scale, zero, scheme.bits, scheme.group)


def weight_range(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest of every group, 0 among them: two ``[N, K/group]``."""
    groups = weight.reshape(len(weight), -1, group)
    return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)


def stored(scale: Tensor, scheme: Scheme, name: str) -> Tensor:
    """``scale`` rounded to the type it is stored in, as float32."""
    rounded = scale.to(_DTYPES[scheme.scale_dtype]).float()
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"tensor {name} needs a scale of {float(scale.abs().max()):.3g}, which "
            f"{scheme.scale_dtype} cannot hold; leave it unquantized: --exclude "
            f"{name.removesuffix('.weight')}"
        )
    return rounded


def quantized(name: str, codes: Tensor, grid: Grid, scheme: Scheme) -> QuantTensor:
    """Codes ``[N, K]`` of a grid as the tensor that is stored under ``name``."""
    n, k = codes.shape
    values = codes.to(torch.uint8).numpy()
    return QuantTensor(
        name,
        scheme.weight_format((n, k)),
        pack_nibbles(values) if grid.bits == 4 else np.ascontiguousarray(values),
        grid.scale.numpy().astype(numpy_dtype(scheme.scale_dtype)),
        None if scheme.symmetric else grid.zero.to(torch.uint8).numpy(),
    )
