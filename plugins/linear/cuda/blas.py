"""Linear for many tokens: cuBLAS through torch, with a norm before it and an epilogue after.

A float8 or int8 product needs x in the same type, so those weights are multiplied in it where
x is to be rounded (``WeightFormat.activation``) and the library takes the shape. All other
quantized weights are written out in x's type first: the dense fallback.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.linear.cuda.kernels.rows import (
    dequantize_float8,
    dequantize_words,
    finish_product,
)
from slipstream.plugins.linear.cuda.tactics import multiplies_in
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.rms_norm.cuda import (
    norm_rows,
    quantize_rows,
    rms_norm,
    rms_norm_quantized,
    row_warps,
)
from slipstream.weights.tensor import WeightFormat

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_INT8_TOKENS = 17  # fewer are refused by torch._int_mm


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a Linear that multiplies in the type of its codes takes for x: codes ``[T, K]`` and
    float32 scales ``[T, 1]``, of x after the norm of that Linear, if it has one.

    ``input_scale`` float32 ``[1]`` is the one of all rows, where each is not to have its own.
    """

    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 0.0

    def rows(self, part: slice) -> Rounding:
        """Those of some tokens."""
        return replace(self, codes=self.codes[part], scales=self.scales[part])


@dataclass(frozen=True, slots=True)
class Operands:
    """The inputs of a Linear beside its weight; see ``cuda.linear``. With ``x_scale`` float32
    ``[T, 1]`` x has been rounded."""

    x: Tensor
    bias: Tensor | None
    residual: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    gated: bool
    gate: int
    dtype: torch.dtype
    pdl: bool
    rounded: Rounding | None
    reader: Rounding | None
    x_scale: Tensor | None = None

    @property
    def gate_kind(self) -> int:
        """0 for no gate, or one more than its kind of ``GATES``: what kernels call GATED."""
        return 1 + self.gate if self.gated else 0


def linear_blas(weight: DeviceWeight, inputs: Operands, y: Tensor) -> None:
    """Fill y ``[T, N]`` or, gated, ``[T, N/2]``, and what its reader takes."""
    x = inputs.x
    dtype = rounds_to(weight.format, x.shape[0], x.device, inputs.dtype)
    if dtype == torch.float8_e4m3fn:
        _float8(weight, inputs, y)
    elif dtype == torch.int8:
        _int8(weight, inputs, y)
    else:
        _dense(weight, inputs, y)


def rounds_to(
    fmt: WeightFormat, tokens: int, device: torch.device, out_dtype: torch.dtype
) -> torch.dtype | None:
    """The type of codes to which ``linear_blas`` rounds x; None if it leaves x as it is."""
    kind = multiplies_in(fmt)
    if kind == "float8" and _has_float8(device, out_dtype):
        return torch.float8_e4m3fn
    return torch.int8 if kind == "int8" and tokens >= _INT8_TOKENS else None


def dequantize(weight: DeviceWeight, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    """The weight ``[N, K]`` in a type; int8 gives the codes of a weight of whole rows, centred.

    Dense weights are returned as they are.
    """
    fmt = weight.format
    if fmt.kind == "dense":
        return weight.codes
    n, k = fmt.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.codes.device)
    options = launch_options(num_warps=4, pdl=pdl)
    if fmt.kind == "float8_e4m3":
        dequantize_float8[(-(-n // 16), -(-k // 256))](
            weight.typed_codes, weight.scale, out, n, k, ROWS=fmt.rows, GROUP=fmt.group,
            BN=16, BK=256, PDL=pdl, **options,
        )  # fmt: skip
        return out
    chunks = weight.codes.shape[1] // 32
    dequantize_words[(-(-n // 32), chunks)](
        weight.codes, weight.scale, weight.shift, out, n, k, chunks, BITS=fmt.bits,
        GROUP=weight.group, ZERO=weight.zero_kind, SCALE=dtype != torch.int8, BN=32, PDL=pdl,
        **options,
    )  # fmt: skip
    return out


@cache
def _has_float8(device: torch.device, out_dtype: torch.dtype) -> bool:
    """Whether the GPU and this torch multiply float8 with a scale a row into this type."""
    # It depends on the GPU, on the version of cuBLAS and on the type, so it is tried.
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False
    x, w = (torch.zeros(n, 64, dtype=torch.float8_e4m3fn, device=device) for n in (32, 64))
    scales = torch.ones(64, device=device)
    out = torch.empty(32, 64, dtype=out_dtype, device=device)
    try:
        _scaled_mm(x, w, scales[:32].view(-1, 1), scales.view(1, -1), out)
    except RuntimeError:
        return False
    return True


def _float8(weight: DeviceWeight, inputs: Operands, y: Tensor) -> None:
    """x is rounded to float8 by a scale a token, or by the weight's own."""
    assert weight.scale is not None
    codes, scale = rounded_x(weight, inputs, torch.float8_e4m3fn)
    product = y if _is_plain(inputs) else _empty(weight, inputs)
    _scaled_mm(codes, weight.codes, scale, weight.scale.view(1, -1), product)
    if product is not y:
        _finish(product, None, None, inputs, y)


def rounded_x(weight: DeviceWeight, inputs: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes ``[T, K]`` and scales ``[T, 1]`` of the input, after its norm."""
    x, static, pdl = inputs.x, weight.input_scale, inputs.pdl
    if inputs.rounded is not None:
        return inputs.rounded.codes, inputs.rounded.scales
    if inputs.norm_weight is None:
        return quantize_rows(x, dtype, input_scale=static, pdl=pdl)
    codes, scale, *_ = rms_norm_quantized(
        x, inputs.norm_weight, inputs.norm_eps, dtype, input_scale=static, pdl=pdl
    )
    return codes, scale


def _scaled_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out: Tensor) -> None:
    if x.device.type == "cuda":
        torch._scaled_mm(
            x, w.t(), x_scale, w_scale, out_dtype=out.dtype, use_fast_accum=True, out=out
        )
    elif x.device.type == "cpu":  # on a device that is only planned there is nothing to compute
        out.copy_((x.float() @ w.float().t()) * x_scale * w_scale)


def _int8(weight: DeviceWeight, inputs: Operands, y: Tensor) -> None:
    """x is rounded to int8 by a scale a token."""
    codes, scale = rounded_x(weight, inputs, torch.int8)
    plain = dequantize(weight, torch.int8, pdl=inputs.pdl)
    product = torch._int_mm(codes, plain.t())
    _finish(product, scale, weight.scale, inputs, y)


def _dense(weight: DeviceWeight, inputs: Operands, y: Tensor) -> None:
    x = normed(inputs)
    w = dequantize(weight, x.dtype, pdl=inputs.pdl).t()
    addend = _only_addend(inputs)
    if x.device.type == "cpu":
        product = (x.float() @ w.float()).to(x.dtype if inputs.gated else inputs.dtype)
        _finish(product, None, None, inputs, y)
    elif _is_plain(inputs):
        _mm(x, w, y)
    elif addend is not None and addend.dtype == x.dtype == y.dtype:
        if x.device.type != "meta":  # for which torch imports its compiler, in a second or two
            torch.addmm(addend, x, w, out=y)  # where y is the addend, without a copy of it before
    else:
        product = _empty(weight, inputs)
        _mm(x, w, product)
        _finish(product, None, None, inputs, y)


def _empty(weight: DeviceWeight, inputs: Operands) -> Tensor:
    """Room for the product with all rows of a weight."""
    rows, x = weight.format.shape[0], inputs.x
    return torch.empty(x.shape[0], rows, dtype=inputs.dtype, device=x.device)


def _only_addend(inputs: Operands) -> Tensor | None:
    """The bias or residual, if just one of them follows the product."""
    if inputs.gated or (inputs.bias is not None and inputs.residual is not None):
        return None
    return inputs.residual if inputs.bias is None else inputs.bias


def _mm(x: Tensor, w: Tensor, out: Tensor) -> None:
    if out.dtype == x.dtype:
        torch.mm(x, w, out=out)
    else:
        torch.mm(x, w, out.dtype, out=out)  # 16-bit operands, float32 result


def normed(inputs: Operands) -> Tensor:
    """x after the norm, if there is one."""
    if inputs.norm_weight is None:
        return inputs.x
    y = rms_norm(inputs.x, inputs.norm_weight, inputs.norm_eps, pdl=inputs.pdl)
    assert isinstance(y, Tensor)
    return y


def _is_plain(inputs: Operands) -> bool:
    return inputs.bias is None and inputs.residual is None and not inputs.gated


def _finish(
    product: Tensor, token_scale: Tensor | None, row_scale: Tensor | None, inputs: Operands,
    y: Tensor,
) -> None:  # fmt: skip
    reader, residual, pdl = inputs.reader, inputs.residual, inputs.pdl
    if reader is not None and reader.norm_weight is not None:
        assert residual is not None and inputs.bias is token_scale is None
        norm_rows(
            product, reader.norm_weight, reader.norm_eps, residual, reader.codes, y,
            reader.scales, reader.input_scale, pdl,
        )  # fmt: skip
        return
    tokens, width = y.shape
    block, warps = 1024, 4
    if reader is not None:
        block = triton.next_power_of_2(width)
        warps = row_warps(block)
    finish_product[(tokens, -(-width // block))](
        product, token_scale, row_scale, inputs.bias, residual, y,
        None if reader is None else reader.scales,
        None if reader is None else reader.input_scale, product.shape[1],
        BLOCK=block, GATED=inputs.gate_kind, SCALE=token_scale is not None,
        BIAS=inputs.bias is not None, RESIDUAL=residual is not None, DTYPE=_TYPES[inputs.dtype],
        PDL=pdl, **launch_options(num_warps=warps, pdl=pdl),
    )  # fmt: skip
