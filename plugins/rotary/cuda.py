"""RotaryAngles on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, Run, attributes_of, required_names
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.rotary.cuda_kernels import angles_kernel


def rotary_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor, factor: float = 1.0, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """factor times cos and sin, float32 ``[T, R]``, of int32 ``positions[T]`` * ``inv_freq[R]``.

    Within 1e-6 of the exact cosine and sine of the float32 angle.
    """
    cos = torch.empty((len(positions), len(inv_freq)), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    if len(positions):
        angles_kernel[(len(positions),)](
            positions,
            inv_freq,
            cos,
            sin,
            factor,
            HALF=len(inv_freq),
            BLOCK=triton.next_power_of_2(len(inv_freq)),
            PDL=pdl,
            **launch_options(num_warps=1, pdl=pdl),
        )
    return cos, sin


def bind(node: ir.Node, context: Context) -> Kernel:
    """A RotaryAngles node as a call."""
    positions, frequencies = required_names(node)
    factor = attributes_of(node)["factor"]

    def kernel(run: Run) -> Sequence[torch.Tensor]:
        inputs = (run.values[positions], run.values[frequencies])
        return rotary_angles(*inputs, factor=factor, pdl=run.pdl)

    return kernel
