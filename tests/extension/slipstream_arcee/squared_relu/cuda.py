"""SquaredRelu on CUDA."""

from __future__ import annotations

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, required_names
from slipstream.plugins.cuda.launch import launch_options
from slipstream_arcee.squared_relu.cuda_kernels import squared_relu_kernel

_BLOCK = 1024


def squared_relu(x: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """max(x, 0)², in the dtype of x."""
    assert x.is_contiguous()
    y = torch.empty_like(x)
    if x.numel():
        squared_relu_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, y, x.numel(), BLOCK=_BLOCK, PDL=pdl, **launch_options(num_warps=4, pdl=pdl)
        )
    return y


def bind(node: ir.Node, context: Context) -> Kernel:
    """A SquaredRelu node as a call."""
    (x,) = required_names(node)
    return lambda run: (squared_relu(run.values[x], pdl=run.pdl),)
