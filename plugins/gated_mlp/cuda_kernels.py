"""Gated activations in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def gate_up_of(gate, up, KIND: tl.constexpr):
    """What a gate lets through, float32; KIND is one more than that of ``GATES``."""
    if KIND == 1:
        result = gate * tl.sigmoid(gate) * up
    elif KIND == 2:  # 0.5 * (1 + tanh(z)) is sigmoid(2z)
        twice = 1.5957691216 * gate * (1.0 + 0.044715 * gate * gate)
        result = gate * tl.sigmoid(tl.maximum(twice, -80.0)) * up
    else:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        result = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    return result


@triton.jit
def gated_kernel(
    gate_up, y, WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Gates of a row are followed by its ups. Grid: (rows, blocks of columns)."""
    begin(PDL)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    at = gate_up + row * (2 * WIDTH) + columns
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + WIDTH, inside, 0.0).to(tl.float32)
    values = gate_up_of(gate, up, KIND)
    tl.store(y + row * WIDTH + columns, values.to(y.dtype.element_ty), inside)
