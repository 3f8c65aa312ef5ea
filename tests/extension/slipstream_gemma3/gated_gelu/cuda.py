"""GatedGELU on CUDA."""

from __future__ import annotations

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, required_names
from slipstream.plugins.cuda.launch import launch_options
from slipstream_gemma3.gated_gelu.cuda_kernels import gated_gelu_kernel

_BLOCK = 1024


def gated_gelu(gate_up: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """gelu(gate) * up ``[T, W]`` of ``[T, 2 * W]``, in its dtype."""
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gated_gelu_kernel[(rows, triton.cdiv(width, _BLOCK))](
            gate_up,
            y,
            WIDTH=width,
            BLOCK=_BLOCK,
            PDL=pdl,
            **launch_options(num_warps=4, pdl=pdl),
        )
    return y


def bind(node: ir.Node, context: Context) -> Kernel:
    """A GatedGELU node as a call."""
    (gate_up,) = required_names(node)
    return lambda run: (gated_gelu(run.values[gate_up], pdl=run.pdl),)
