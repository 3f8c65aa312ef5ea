"""gelu(gate) * up in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def gated_gelu_kernel(gate_up, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Gates of a row are followed by its ups. Grid: (rows, blocks of columns)."""
    begin(PDL)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    at = gate_up + row * (2 * WIDTH) + columns
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + WIDTH, inside, 0.0).to(tl.float32)
    # 0.5 * (1 + tanh(z)) is 1 / (1 + exp(-2z)).
    twice = 1.5957691216 * gate * (1.0 + 0.044715 * gate * gate)
    values = gate / (1.0 + tl.exp(-twice)) * up
    tl.store(y + row * WIDTH + columns, values.to(y.dtype.element_ty), inside)
