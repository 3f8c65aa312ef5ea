"""Device functions that the kernels of several plugins share."""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)
# The least scale of a row: zeros quantize to zeros, not to 0 / 0.
LEAST_SCALE = tl.constexpr(1e-12)
# Adding and subtracting 1.5 * 2**23 rounds a small float to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def begin(PDL: tl.constexpr):
    """The start of a kernel that reads or writes what another one does: the next kernel may start
    too, and everything before this one is finished."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Asks for the cache lines at pointers; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def codes(y, scale, dtype: tl.constexpr):
    """float32 values in units of ``scale`` as float8_e4m3fn or int8, saturated."""
    if dtype == tl.int8:
        y = tl.minimum(tl.maximum(y / scale, -INT8_MAX), INT8_MAX)
        return ((y + _ROUND) - _ROUND).to(tl.int8)
    return tl.minimum(tl.maximum(y / scale, -FP8_MAX), FP8_MAX).to(dtype)


@triton.jit
def row_scale(y, dtype: tl.constexpr):
    """The scale with which a row's largest value is the largest code."""
    largest = INT8_MAX if dtype == tl.int8 else FP8_MAX
    return tl.maximum(tl.max(tl.abs(y)) / largest, LEAST_SCALE)


@triton.jit
def store_quantized(to, scales, row, y, columns, inside, input_scale):
    """Stores a row's codes, at ``to + columns``, and its scale, which is ``input_scale`` if that is
    given."""
    dtype: tl.constexpr = to.dtype.element_ty
    scale = row_scale(y, dtype) if input_scale is None else tl.load(input_scale)
    tl.store(to + columns, codes(y, scale, dtype), inside)
    tl.store(scales + row, scale)
