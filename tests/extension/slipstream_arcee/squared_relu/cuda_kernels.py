"""max(x, 0)² in Triton."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin


@triton.jit
def squared_relu_kernel(x, y, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: blocks of elements."""
    begin(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(tl.load(x + at, at < count, 0.0).to(tl.float32), 0.0)
    tl.store(y + at, (positive * positive).to(y.dtype.element_ty), at < count)
