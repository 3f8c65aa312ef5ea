"""silu(gate) * up in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin, store_quantized


@triton.jit
def gated(gate_up, row, columns, inside, WIDTH: tl.constexpr):
    """float32 values of a row whose gates are followed by its ups."""
    at = gate_up + row * (2 * WIDTH) + columns
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + WIDTH, inside, 0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gated_kernel(gate_up, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: (blocks of columns, rows)."""
    begin(PDL)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(1).to(tl.int64)
    values = gated(gate_up, row, columns, inside, WIDTH)
    tl.store(y + row * WIDTH + columns, values.to(y.dtype.element_ty), inside)


@triton.jit
def gated_quantized_kernel(
    gate_up, input_scale, y, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Grid: (rows,)."""
    begin(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    values = gated(gate_up, row, columns, inside, WIDTH)
    store_quantized(y + row * WIDTH, scales, row, values, columns, inside, input_scale)
