"""Kernels of Linear and Embedding beside the products: row lookup, dequantization, epilogue."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin, store_quantized
from slipstream.plugins.gated_mlp.cuda_kernels import gate_up_of
from slipstream.plugins.linear.cuda.kernels.dot import float4, float8_bits, power


@triton.jit
def _float8(codes):
    """float8_e4m3, or its bits in uint8, as float32."""
    if codes.dtype == tl.uint8:
        codes = float8_bits(codes)
    return codes.to(tl.float32)


@triton.jit
def _decode_at(
    codes, scale, shift, rows, k, K, inside,
    KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    ZERO: tl.constexpr,
):  # fmt: skip
    """Elements k of rows of a weight, as float32; see ``embedding_rows`` for the constants."""
    wide = rows.to(tl.int64)
    if KIND == "dense":
        value = tl.load(codes + wide * K + k, mask=inside, other=0.0).to(tl.float32)
    else:
        groups = tl.cdiv(K, 256) * 8 if ZERO == "e2m1" else tl.cdiv(K, GROUP)
        place = (wide // ROWS) * groups + k // GROUP
        factor = tl.load(scale + place, mask=inside, other=0.0)
        factor = power(factor.to(tl.int32)) if ZERO == "e2m1" else factor.to(tl.float32)
        if KIND == "fp8":
            value = _float8(tl.load(codes + wide * K + k, mask=inside, other=0.0))
        else:
            CHUNK: tl.constexpr = 1024 // BITS
            words = tl.cdiv(K, CHUNK) * 32
            at = wide * words + (k // CHUNK) * 32 + k % 32
            word = tl.load(codes + at, mask=inside, other=0)
            code = (word >> ((k % CHUNK) // 32 * BITS)) & ((1 << BITS) - 1)
            value = float4(code, 0) * 2.0**63 if ZERO == "e2m1" else code.to(tl.float32)
            if ZERO == "midpoint":
                value -= 2.0 ** (BITS - 1)
            elif ZERO == "zero":
                value -= tl.load(shift + place, mask=inside, other=0).to(tl.float32)
        value = value * factor
        if ZERO == "offset":
            value += tl.load(shift + place, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def embedding_rows(
    token_ids, last_tokens, slots, first, codes, scale, shift, y, sequences, V, K,
    BLOCK: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, ZERO: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of a weight [V, K] by token id; grid (tokens, blocks of K).

    KIND "dense", "fp8" or "int". With LAST an id of -1 stands for ``last_tokens[slots[row]]``.
    Numbers out of range are moved into it: they belong to rows that nobody reads. With ``first``
    they are rows of other parts of a table, this one beginning there: zeros.
    """
    begin(PDL)
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row)
    if LAST:
        slot = tl.minimum(tl.maximum(tl.load(slots + row), 0), sequences - 1)
        token = tl.where(token == -1, tl.load(last_tokens + slot), token)
    inside = k < K
    if first is not None:
        token -= tl.load(first)
        inside &= (token >= 0) & (token < V)
    token = tl.minimum(tl.maximum(token, 0), V - 1)
    values = _decode_at(
        codes, scale, shift, token, k, K, inside, KIND, BITS, GROUP, ROWS, ZERO
    )  # fmt: skip
    if first is not None:
        values = tl.where(inside, values, 0.0)  # an offset or a zero point is no code
    tl.store(y + row.to(tl.int64) * K + k, values.to(y.dtype.element_ty), mask=k < K)


@triton.jit
def dequantize_float8(
    codes, scale, y, N, K, ROWS: tl.constexpr, GROUP, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A float8 weight [N, K] in the type of y; a scale for ROWS rows and GROUP columns."""
    begin(PDL)
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (n < N) & (k < K)
    at = n.to(tl.int64) * K + k
    groups = tl.cdiv(K, GROUP)
    rows = tl.minimum(n, N - 1)
    factor = tl.load(scale + (rows // ROWS) * groups + tl.minimum(k // GROUP, groups - 1))
    values = _float8(tl.load(codes + at, mask=inside, other=0.0)) * factor
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_words(
    codes, scale, shift, y, N, K, chunks,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A weight [N, chunks * 32 words] as [N, K] in the type of y; grid (rows, chunks).

    GROUP 0 is a scale a row; ZERO as in ``gemv_int``. Without SCALE the codes minus the midpoint,
    for int8 products.
    """
    begin(PDL)
    CODES: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    chunk = tl.program_id(1)
    j = tl.arange(0, 32)
    row = tl.minimum(n, N - 1)
    words = tl.load(codes + row.to(tl.int64)[:, None] * (chunks * 32) + chunk * 32 + j[None, :])
    groups = K // GROUP if GROUP else 1
    if ZERO == "e2m1":
        groups = chunks * 8
    for i in tl.static_range(CODES):
        k = (chunk * CODES + i) * 32 + j
        group = tl.minimum((chunk * CODES + i) * 32 // GROUP, groups - 1) if GROUP else 0
        if ZERO == "e2m1":
            values = float4(words, i) * 2.0**63
        else:
            values = ((words >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        if ZERO == "midpoint":
            values = values - 2.0 ** (BITS - 1)
        elif ZERO == "zero":
            values -= tl.load(shift + row * groups + group).to(tl.float32)[:, None]
        if ZERO == "e2m1":
            values = values * power(tl.load(scale + row * groups + group).to(tl.int32))[:, None]
        elif SCALE:
            values = values * tl.load(scale + row * groups + group).to(tl.float32)[:, None]
        if ZERO == "offset":
            values += tl.load(shift + row * groups + group).to(tl.float32)[:, None]
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        inside = (n < N)[:, None] & (k < K)[None, :]
        tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finish_product(
    product, token_scale, row_scale, bias, residual, y, scales, input_scale, N,
    BLOCK: tl.constexpr, GATED: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``act(product * scales + bias) + residual`` of a product [T, N], in DTYPE; grid (T, blocks of
    width).

    SCALE: token_scale [T] and row_scale [N], both float32, for products of int8. With ``scales``
    [T], y is the codes of the result, the same as if that was stored before, and a block is a whole
    row; ``input_scale`` as in ``store_quantized``.
    """
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    width = N // 2 if GATED else N
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    value = tl.load(product + t * N + n, mask=inside, other=0).to(tl.float32)
    if SCALE:
        factor = tl.load(token_scale + t)
        value = value * factor * tl.load(row_scale + n, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(product + t * N + width + n, mask=inside, other=0).to(tl.float32)
        if SCALE:
            up_scale = tl.load(row_scale + width + n, mask=inside, other=0.0).to(tl.float32)
            up = up * factor * up_scale
        if BIAS:
            up += tl.load(bias + width + n, mask=inside, other=0.0).to(tl.float32)
        value = gate_up_of(value, up, GATED)
    if RESIDUAL:
        value += tl.load(residual + t * width + n, mask=inside, other=0.0).to(tl.float32)
    value = value.to(DTYPE)
    if scales is not None:
        value = value.to(tl.float32)
        store_quantized(y + t * width, scales, t, value, n, inside, input_scale)
    else:
        tl.store(y + t * width + n, value, mask=inside)
