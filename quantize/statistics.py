"""What calibration keeps of the inputs of linears: Gram matrices, largest values, a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 256  # rows of x kept, spread over all tokens
# A Gram matrix of few tokens fits those tokens only: its off-diagonal is shrunk by this times K
# over the tokens, within bounds. Measured on held-out text; the lower bound is for a change of
# domain, which more tokens do not cure.
_SHRINKAGE, _LEAST, _MOST = 1.5, 0.1, 0.6
# Fewer tokens than this say too little. Of SmolLM2-135M's linears in 4 bits, errors on other text
# were above those of rounding to nearest with up to 8 tokens, and below them from 16 on; tokens of
# an expert are more alike than the random ones that were taken.
LEAST_TOKENS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What is known of the x that some linears read.

    gram     float32 ``[K, K]``: the mean of x xᵀ over tokens. Where the linear's output is added
             to the residual stream, a token counts by the inverse of its mean square there, since
             the next norm divides by that, and one of an expert by the square of its weight, too.
    largest  ``[K]``: the largest magnitude of each channel.
    sample   ``[S, K]``: some of the tokens.
    tokens   how many were seen; ``dropped``: how many more were not finite.
    """

    gram: Tensor
    largest: Tensor
    sample: Tensor
    tokens: int
    dropped: int = 0

    @property
    def suffice(self) -> bool:
        """Whether there were tokens enough to choose by."""
        return self.tokens >= LEAST_TOKENS

    def rescaled(self, scales: Tensor) -> Inputs:
        """Those of ``x / scales``."""
        return Inputs(
            self.gram / scales / scales[:, None],
            self.largest / scales,
            self.sample / scales,
            self.tokens,
            self.dropped,
        )

    def regularized(self) -> Tensor:
        """The Gram matrix with its off-diagonal shrunk, for choices that must hold for other
        text."""
        shrinkage = min(max(_SHRINKAGE * len(self.gram) / max(self.tokens, 1), _LEAST), _MOST)
        out = self.gram * (1 - shrinkage)
        out.diagonal().copy_(self.gram.diagonal())
        return out


def stream_factors(residual: Tensor) -> Tensor:
    """What tokens ``[T, hidden]`` of the residual stream count by: ``[T]``, NaN for those that are
    not finite."""
    squares = residual.square().mean(dim=-1)
    return torch.where(squares.isfinite(), squares.add(1e-12).rsqrt(), torch.nan)


class Collector:
    """Adds up ``Inputs`` over ``expected`` tokens."""

    def __init__(self, expected: int) -> None:
        self._stride = max(1, expected // _SAMPLE)
        self._gram: Tensor | None = None
        self._largest: Tensor | None = None
        self._sample: list[Tensor] = []
        self._tokens = self._dropped = 0

    def add(self, x: Tensor, factors: Tensor | None) -> None:
        """Tokens ``[T, K]``; those of the Gram matrix are multiplied by ``factors`` ``[T]``."""
        finite = x.isfinite().all(dim=-1)
        if factors is not None:
            finite &= factors.isfinite()
        if not bool(finite.all()):
            self._dropped += int((~finite).sum())
            x, factors = x[finite], None if factors is None else factors[finite]
        if not len(x):
            return
        largest = x.abs().amax(dim=0)
        self._largest = largest if self._largest is None else self._largest.maximum(largest)
        self._sample.append(x[:: self._stride].clone())
        self._tokens += len(x)
        if factors is not None:
            x = x * factors[:, None]
        gram = x.t() @ x
        self._gram = gram if self._gram is None else self._gram.add_(gram)

    def result(self) -> Inputs | None:
        """None when no token was finite, or their squares are not."""
        if self._gram is None or self._largest is None or not bool(self._gram.isfinite().all()):
            return None
        gram = self._gram / self._tokens
        sample = torch.cat(self._sample)
        return Inputs(gram, self._largest, sample, self._tokens, self._dropped)
