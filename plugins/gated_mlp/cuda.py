"""The gated activation on CUDA, plain or quantized for the product after it."""

from __future__ import annotations

import torch
import triton

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.gated_mlp.cuda_kernels import gated_kernel, gated_quantized_kernel
from slipstream.plugins.rms_norm.cuda import empty_codes, row_warps

_BLOCK = 1024


def gated_activation(gate_up: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """silu(gate) * up ``[T, W]`` of ``[T, 2 * W]``, in its dtype."""
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gated_kernel[(triton.cdiv(width, _BLOCK), rows)](
            gate_up,
            y,
            WIDTH=width,
            BLOCK=_BLOCK,
            PDL=pdl,
            **launch_options(num_warps=4, pdl=pdl),
        )
    return y


def gated_activation_quantized(
    gate_up: torch.Tensor,
    dtype: torch.dtype,
    input_scale: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as codes ``[T, W]`` of float8_e4m3fn or int8 and float32 scales ``[T, 1]``.

    Without ``input_scale``, float32 ``[1]``, a row's largest value has the largest code.
    """
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scales = empty_codes(rows, width, dtype, gate_up.device)
    block = triton.next_power_of_2(width)
    if rows:
        gated_quantized_kernel[(rows,)](
            gate_up,
            input_scale,
            codes,
            scales,
            WIDTH=width,
            BLOCK=block,
            PDL=pdl,
            **launch_options(num_warps=row_warps(block), pdl=pdl),
        )
    return codes, scales
