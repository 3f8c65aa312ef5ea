"""NormedRouter on CUDA."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import onnx_ir as ir
import torch
import triton
from torch import Tensor

from slipstream.plugins.cuda.binding import (
    Context,
    Kernel,
    attributes_of,
    input_names,
    name_of,
)
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.linear.cuda.bind import weight_of
from slipstream.plugins.linear.cuda.linear import linear
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.normed_router.cuda_kernels import normed_router_kernel
from slipstream.plugins.rms_norm.cuda import rms_norm
from slipstream.plugins.router.cuda import choice, router

# Up to so many tokens one launch is quicker than three: each program reads x and a part of the
# router for one token alone.
FUSED_TOKENS = 16
_MOST_COLUMNS = 8192  # of a row that a program has in registers


@dataclass(frozen=True, slots=True)
class Routing:
    """The attributes of ``Router``."""

    top_k: int
    scoring: int = 0
    renormalize: int = 0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, slots=True)
class NormedRouter:
    """A router ``[E, K]`` of 16-bit floats, the weight ``[K]`` of the norm before it, bias ``[E]``,
    correction float32 ``[E]``; counters int32, zero between launches: how many programs of a token
    are done."""

    weight: DeviceWeight
    norm_weight: Tensor
    norm_eps: float
    bias: Tensor | None
    correction: Tensor | None
    routing: Routing
    counters: Tensor

    @classmethod
    def of(
        cls,
        weight: DeviceWeight,
        norm_weight: Tensor,
        norm_eps: float,
        bias: Tensor | None = None,
        correction: Tensor | None = None,
        *,
        routing: Routing,
    ) -> NormedRouter:
        """A router with its counters."""
        counters = torch.zeros(FUSED_TOKENS, dtype=torch.int32, device=norm_weight.device)
        return cls(weight, norm_weight, norm_eps, bias, correction, routing, counters)


def in_one_launch(tokens: int, width: int) -> bool:
    """Whether one kernel does all of it for so many rows, so that the product has no tactic."""
    return tokens <= FUSED_TOKENS and width <= _MOST_COLUMNS


def normed_router(
    x: Tensor, layer: NormedRouter, tactics: Tactics, *, pdl: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x ``[T, K]`` in its type, and experts int32 and their weights float32
    ``[T, top_k]``."""
    assert x.is_contiguous() and layer.weight.codes.dtype == x.dtype
    if in_one_launch(*x.shape) and not tactics.deterministic:
        return _fused(x, layer, pdl)
    y = rms_norm(x, layer.norm_weight, layer.norm_eps, pdl=pdl)
    assert isinstance(y, Tensor)
    logits = linear(
        y,
        layer.weight,
        bias=layer.bias,
        out_dtype=torch.float32,
        tactic=tactics.find(layer.weight.format, False, len(x)),
        pdl=pdl,
    )
    return y, *router(logits, layer.correction, pdl=pdl, **_attributes(layer.routing))


def _fused(x: Tensor, layer: NormedRouter, pdl: bool) -> tuple[Tensor, Tensor, Tensor]:
    routing, (experts, width) = layer.routing, layer.weight.format.shape
    tokens, device, columns = len(x), x.device, triton.next_power_of_2(width)
    y = torch.empty_like(x)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=device)
    ids = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=device)
    rows = 1 if experts <= 256 else 2
    if tokens:
        normed_router_kernel[(triton.cdiv(experts, rows), tokens)](
            x, layer.weight.codes, layer.norm_weight, layer.bias, layer.correction, y, logits,
            layer.counters, ids, weights, layer.norm_eps, routing.scale,
            WIDTH=width, COLUMNS=columns, ROWS=rows, PDL=pdl,
            **choice(
                experts, layer.correction, routing.top_k, routing.scoring, routing.renormalize,
                routing.groups, routing.top_groups,
            ),
            **launch_options(num_warps=min(max(columns // 2048, 1), 4), pdl=pdl),
        )  # fmt: skip
    return y, ids, weights


def _attributes(routing: Routing) -> dict[str, Any]:
    return {field.name: getattr(routing, field.name) for field in fields(routing)}


def bind(node: ir.Node, context: Context) -> Kernel:
    """A NormedRouter node as a call."""
    x, attributes = name_of(node.inputs[0]), attributes_of(node)
    _, _, norm_weight, bias, correction = (
        None if name is None else context.constants.get(name) for name in input_names(node, 5)
    )
    assert norm_weight is not None
    layer = NormedRouter.of(
        weight_of(node, context.constants),
        norm_weight,
        attributes["norm_eps"],
        bias,
        correction,
        routing=Routing(**{field.name: attributes[field.name] for field in fields(Routing)}),
    )
    return lambda run: normed_router(run.values[x], layer, context.tactics, pdl=run.pdl)
