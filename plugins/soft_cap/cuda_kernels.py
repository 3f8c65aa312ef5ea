"""cap * tanh(x / cap) in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def soft_cap_kernel(x, y, count, cap, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: blocks of elements."""
    begin(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ratio = tl.load(x + at, at < count, 0.0).to(tl.float32) / cap
    # tanh(|z|) is (1 - e) / (1 + e) of e = exp(-2|z|), which cannot overflow.
    e = tl.exp(-2.0 * tl.abs(ratio))
    capped = cap * (1.0 - e) / (1.0 + e)
    tl.store(y + at, tl.where(ratio < 0, -capped, capped).to(y.dtype.element_ty), at < count)
