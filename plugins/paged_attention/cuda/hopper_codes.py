"""Queries as codes of float8, which Hopper's tensor cores multiply by keys of float8 pages as they
are.

A query is the sum of two codes times a power of two of its row: exactly where an element is a
bfloat16 of at least 2^-9 of the row's largest, else to 2^-9 of itself or 2^-17 of that. Two
products in float8 take as long as one in 16 bits, for which keys would be decoded first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_LEAST_EXPONENT = gl.constexpr(64)  # of float32, which a row of zeros is given
# The largest of a row becomes 128 or more, but less than 256, of the 448 of float8.
_TO_CODES = gl.constexpr(127 + 7)


@gluon.jit
def store_codes(x, high, low):
    """Stores queries float32 ``[N, D]`` as high and low codes in shared memory; the unit ``[N]`` of
    their sum, NaN of a row with an infinity, which no code is."""
    bits = gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True)
    exponent = gl.maximum(bits >> 23, _LEAST_EXPONENT)
    x = x * (_TO_CODES + 127 - exponent << 23).to(gl.float32, bitcast=True)[:, None]
    codes = x.to(high.dtype)
    high.store(codes)
    low.store((x - codes.to(gl.float32)).to(low.dtype))
    unit = (exponent + 127 - _TO_CODES << 23).to(gl.float32, bitcast=True)
    return gl.where(exponent < 255, unit, float("nan"))
