"""Norms and quantization of rows in Triton: a program has a row in registers."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin, store_quantized


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    input_scale,
    y,
    total,
    scales,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = norm(x + residual), and the sum. With ``scales``, y is quantized. Grid: (rows,).

    The sum is rounded to its dtype before the norm, so that a row is the same where the two are
    computed apart.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = row * WIDTH + columns
    values = tl.load(x + at, inside, 0.0)
    if residual is not None:
        other = tl.load(residual + at, inside, 0.0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, values, inside)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / WIDTH + eps)
    normed = values * scale * w
    if scales is not None:
        store_quantized(y + row * WIDTH, scales, row, normed, columns, inside, input_scale)
    else:
        tl.store(y + at, normed.to(y.dtype.element_ty), inside)


@triton.jit
def quantize_kernel(
    x, input_scale, y, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The codes and scales of rows. Grid: (rows,)."""
    begin(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * WIDTH + columns, inside, 0.0).to(tl.float32)
    store_quantized(y + row * WIDTH, scales, row, values, columns, inside, input_scale)
