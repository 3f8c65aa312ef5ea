"""The gated activation on CUDA."""

from __future__ import annotations

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, attributes_of, required_names
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.gated_mlp.cuda_kernels import gated_kernel

_BLOCK = 1024


def gated_activation(gate_up: torch.Tensor, gate: int = 0, *, pdl: bool = False) -> torch.Tensor:
    """Gated ups ``[T, W]`` of ``[T, 2 * W]``, in its dtype; ``gate`` is a kind of ``GATES``."""
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gated_kernel[(rows, triton.cdiv(width, _BLOCK))](
            gate_up,
            y,
            WIDTH=width,
            KIND=1 + gate,
            BLOCK=_BLOCK,
            PDL=pdl,
            **launch_options(num_warps=4, pdl=pdl),
        )
    return y


def bind(node: ir.Node, context: Context) -> Kernel:
    """A GatedActivation node as a call."""
    (gate_up,) = required_names(node)
    gate = attributes_of(node)["gate"]
    return lambda run: (gated_activation(run.values[gate_up], gate, pdl=run.pdl),)
