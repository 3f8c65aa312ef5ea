"""The ExpertLinears of a model as problems to tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from slipstream.plugins.cuda.launch import PDL_TOKENS, has_pdl
from slipstream.plugins.expert_linear.cuda.experts import Experts, Grouping, expert_linear, group
from slipstream.plugins.expert_linear.cuda.tactics import (
    BUCKETS,
    GEMV_TOKENS,
    ExpertShape,
    candidate_tactics,
)
from slipstream.plugins.linear.cuda.tactics import Tactic
from slipstream.plugins.linear.cuda.weight import DeviceWeight

_ROUTES = 16  # choices that launches take in turn, so that they find few experts in the cache


@dataclass(frozen=True, slots=True)
class ExpertProblem:
    """The ExpertLinears of one shape: their weights, and one of them, whose weight does not
    count."""

    weights: tuple[DeviceWeight, ...]
    experts: Experts
    top_k: int
    residual: bool
    dtype: torch.dtype
    buckets: tuple[int, ...] = BUCKETS

    @property
    def shape(self) -> ExpertShape:
        """What the choice of a tactic depends on."""
        return self.experts.shape(self.top_k)

    def key(self, bucket: int) -> str:
        """The key in the table of tactics."""
        return self.shape.key(bucket)

    def candidates(self, tokens: int, capability: tuple[int, int]) -> list[Tactic]:
        """What is worth timing, the default first."""
        return candidate_tactics(self.shape, tokens, capability)

    def nbytes(self, tokens: int) -> float:
        """Bytes of the experts that the tokens of ``calls`` choose, on average."""
        return self.weights[0].nbytes / self.shape.number * self.distinct(tokens)

    def distinct(self, tokens: int) -> float:
        """Different experts that the tokens of ``calls`` choose, on average."""
        counts = [len(torch.unique(ids)) for ids in self.routes(tokens)]
        return sum(counts) / _ROUTES

    def routes(self, tokens: int) -> list[Tensor]:
        """Experts int32 ``[T, top_k]`` as routers of random weights choose them, the same at every
        call."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(_ROUTES, tokens, self.shape.number, generator=generator)
        ids = logits.topk(self.top_k).indices.to(torch.int32)
        return list(ids.to(self.weights[0].codes.device))

    def calls(self, tokens: int, tactics: Sequence[Tactic]) -> list[Callable[[int], Tensor]]:
        """For each tactic a launch on the weight and the choice of a number.

        Where gemv is worth timing, which needs no grouping of the pairs, that is part of a launch;
        beyond, all need one, and it is there.
        """
        weight, routes = self.weights[0], self.routes(tokens)
        device, (n, k) = weight.codes.device, self.shape.format.shape
        rows = tokens * self.top_k if self.experts.reduce else tokens
        x = torch.randn(rows, k, device=device).to(self.dtype)
        pdl = has_pdl(device) and tokens <= PDL_TOKENS
        factors = residual = None
        if self.experts.reduce:
            factors = torch.full((tokens, self.top_k), 1 / self.top_k, device=device)
        if self.residual:
            residual = torch.randn(tokens, n, device=device).to(self.dtype)
        groupings: list[Grouping] | list[None] = [None] * _ROUTES
        if tokens > GEMV_TOKENS:
            groupings = [group(ids, self.shape.number) for ids in routes]
        layers = [replace(self.experts, weight=weight) for weight in self.weights]

        def call(tactic: Tactic, index: int) -> Tensor:
            return expert_linear(
                x,
                layers[index % len(layers)],
                routes[index % _ROUTES],
                factors,
                residual,
                tactic=tactic,
                grouping=groupings[index % _ROUTES],
                pdl=pdl,
            )

        return [partial(call, tactic) for tactic in tactics]
