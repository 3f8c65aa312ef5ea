"""The Linears of a model as problems to tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slipstream.plugins.cuda.launch import PDL_TOKENS, has_pdl
from slipstream.plugins.linear.cuda.candidates import candidate_tactics
from slipstream.plugins.linear.cuda.linear import linear
from slipstream.plugins.linear.cuda.tactics import (
    BUCKETS,
    Tactic,
    entry_key,
)
from slipstream.plugins.linear.cuda.weight import DeviceWeight


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """The Linears of one shape: their weights, and what is fused into them."""

    weights: tuple[DeviceWeight, ...]
    gated: bool
    norm: bool
    residual: bool
    dtype: torch.dtype
    out_dtype: torch.dtype
    buckets: tuple[int, ...] = BUCKETS

    def key(self, bucket: int) -> str:
        """The key in the table of tactics."""
        return entry_key(self.weights[0].format, self.gated, bucket)

    def candidates(self, tokens: int, capability: tuple[int, int]) -> list[Tactic]:
        """What is worth timing, the default first."""
        return candidate_tactics(self.weights[0].format, self.gated, tokens, capability)

    def nbytes(self, tokens: int) -> float:
        """Bytes of one weight, whatever the tokens are."""
        return self.weights[0].nbytes

    def calls(self, tokens: int, tactics: Sequence[Tactic]) -> list[Callable[[int], Tensor]]:
        """For each tactic a launch on the weight of a number, all of them on the same input."""
        n, k = self.weights[0].format.shape
        device = self.weights[0].codes.device
        x = torch.randn(tokens, k, device=device).to(self.dtype)
        norm = torch.ones(k, dtype=self.dtype, device=device) if self.norm else None
        width = n // 2 if self.gated else n
        residual = None
        if self.residual:
            residual = torch.randn(tokens, width, device=device).to(self.dtype)
        out = torch.empty(tokens, width, dtype=self.out_dtype, device=device)
        pdl = has_pdl(device) and tokens <= PDL_TOKENS

        def call(tactic: Tactic, index: int) -> Tensor:
            return linear(
                x,
                self.weights[index % len(self.weights)],
                residual=residual,
                norm_weight=norm,
                norm_eps=1e-5,
                gated=self.gated,
                out_dtype=self.out_dtype,
                tactic=tactic,
                out=out,
                pdl=pdl,
            )

        return [partial(call, tactic) for tactic in tactics]
