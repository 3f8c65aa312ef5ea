"""Router on CUDA."""

from __future__ import annotations

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, attributes_of, input_names, name_of
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.router import SCORINGS
from slipstream.plugins.router.cuda_kernels import router_kernel

Choice = tuple[torch.Tensor, torch.Tensor]


def router(  # noqa: PLR0913 - the operator's attributes
    logits: torch.Tensor,
    correction: torch.Tensor | None = None,
    *,
    top_k: int,
    scoring: int = SCORINGS["softmax"],
    renormalize: int = 0,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    pdl: bool = False,
) -> Choice:
    """Experts int32 and their weights float32, ``[T, top_k]``, of logits ``[T, E]``."""
    assert logits.is_contiguous()
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        router_kernel[(tokens,)](
            logits, correction, ids, weights, scale,
            **choice(experts, correction, top_k, scoring, renormalize, groups, top_groups),
            PDL=pdl, **launch_options(num_warps=1, pdl=pdl),
        )  # fmt: skip
    return ids, weights


def choice(
    experts: int,
    correction: torch.Tensor | None,
    top_k: int,
    scoring: int,
    renormalize: int,
    groups: int,
    top_groups: int,
) -> dict[str, int | bool]:
    """What a kernel that chooses experts is compiled for."""
    return {
        "EXPERTS": experts,
        "BLOCK": max(triton.next_power_of_2(experts), 16),
        "TOP_K": top_k,
        "SLOTS": triton.next_power_of_2(top_k),
        "SIGMOID": scoring == SCORINGS["sigmoid"],
        "CORRECTED": correction is not None,
        "RENORMALIZE": bool(renormalize),
        "GROUPS": groups,
        "TOP_GROUPS": top_groups,
    }


def bind(node: ir.Node, context: Context) -> Kernel:
    """A Router node as a call."""
    logits, (_, correction) = name_of(node.inputs[0]), input_names(node, 2)
    attributes = attributes_of(node)
    return lambda run: router(run.values[logits], run.get(correction), pdl=run.pdl, **attributes)
