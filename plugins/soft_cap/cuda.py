"""SoftCap on CUDA."""

from __future__ import annotations

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, attributes_of, dtype_of, required_names
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.soft_cap.cuda_kernels import soft_cap_kernel

_BLOCK = 1024


def soft_cap(
    x: torch.Tensor,
    cap: float,
    out_dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """cap * tanh(x / cap), in ``out_dtype`` (else that of x), into ``out`` if given."""
    assert x.is_contiguous()
    y = torch.empty_like(x, dtype=out_dtype) if out is None else out
    if x.numel():
        soft_cap_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, y, x.numel(), cap, BLOCK=_BLOCK, PDL=pdl, **launch_options(num_warps=4, pdl=pdl)
        )
    return y


def bind(node: ir.Node, context: Context) -> Kernel:
    """A SoftCap node as a call."""
    (x,) = required_names(node)
    cap, dtype = attributes_of(node)["cap"], dtype_of(node)
    return lambda run: (soft_cap(run.values[x], cap, dtype, out=run.out, pdl=run.pdl),)
