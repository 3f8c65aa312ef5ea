"""Cosines and sines of rotary angles in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def angles_kernel(
    positions,
    inv_freq,
    cos,
    sin,
    factor,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of angles. Grid: (tokens,)."""
    begin(PDL)
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    position = tl.load(positions + token).to(tl.float32)
    angle = position * tl.load(inv_freq + columns, inside, 0.0)
    at = token * HALF + columns
    tl.store(cos + at, tl.cos(angle) * factor, inside)
    tl.store(sin + at, tl.sin(angle) * factor, inside)
