"""RMS norms on CUDA, with the residual add before and the quantization after them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
import triton

from slipstream.plugins.cuda.binding import Context, Kernel, Run, attributes_of, required_names
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.rms_norm.cuda_kernels import quantize_kernel, rms_norm_kernel


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x²) + eps) * weight of rows ``[T, H]``, in the dtype of x.

    With a residual ``[T, H]``, the norm of the sum and the sum, rounded to the dtype of x.
    """
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    norm_rows(x, weight, eps, residual, y, total, None, None, pdl)
    return y if total is None else (y, total)


def rms_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    residual: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The norm as codes ``[T, H]`` of float8_e4m3fn or int8 and float32 scales ``[T, 1]``, and the
    sum if there is a residual.

    Without ``input_scale``, float32 ``[1]``, a row's largest value has the largest code.
    """
    codes, scales = empty_codes(x.shape[0], x.shape[1], dtype, x.device)
    total = None if residual is None else torch.empty_like(x)
    norm_rows(x, weight, eps, residual, codes, total, scales, input_scale, pdl)
    return (codes, scales) if total is None else (codes, scales, total)


def quantize_rows(
    x: torch.Tensor,
    dtype: torch.dtype,
    input_scale: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn or int8 codes ``[T, H]`` and float32 scales ``[T, 1]`` of rows ``[T, H]``."""
    assert x.is_contiguous()
    codes, scales = empty_codes(x.shape[0], x.shape[1], dtype, x.device)
    block = triton.next_power_of_2(x.shape[1])
    if len(x):
        quantize_kernel[(len(x),)](
            x,
            input_scale,
            codes,
            scales,
            WIDTH=x.shape[1],
            BLOCK=block,
            PDL=pdl,
            **launch_options(num_warps=row_warps(block), pdl=pdl),
        )
    return codes, scales


def empty_codes(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the codes ``[rows, columns]`` and float32 scales ``[rows, 1]`` of a matrix."""
    return (
        torch.empty((rows, columns), dtype=dtype, device=device),
        torch.empty((rows, 1), dtype=torch.float32, device=device),
    )


def row_warps(block: int) -> int:
    """Warps of a program that has ``block`` columns: 16 bytes a thread and load, up to 16 warps."""
    return min(max(block // 256, 1), 16)


def norm_rows(  # noqa: PLR0913 - the kernel's inputs
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    total: torch.Tensor | None,
    scales: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    pdl: bool,
) -> None:
    """Fill y ``[T, H]``, the sum ``total`` if there is a residual, and the ``scales`` ``[T, 1]`` of
    y if that is to be codes; see ``rms_norm`` and ``rms_norm_quantized``."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    block = triton.next_power_of_2(x.shape[1])
    if len(x):
        rms_norm_kernel[(len(x),)](
            x,
            residual,
            weight,
            input_scale,
            y,
            total,
            scales,
            eps,
            WIDTH=x.shape[1],
            BLOCK=block,
            PDL=pdl,
            **launch_options(num_warps=row_warps(block), pdl=pdl),
        )


def bind(node: ir.Node, context: Context) -> Kernel:
    """A FusedAddRMSNorm node as a call."""
    x, residual, weight = required_names(node)
    eps = attributes_of(node)["norm_eps"]

    def kernel(run: Run) -> Sequence[torch.Tensor]:
        values = run.values
        both = rms_norm(values[x], values[weight], eps, residual=values[residual], pdl=run.pdl)
        assert isinstance(both, tuple)
        return both

    return kernel
