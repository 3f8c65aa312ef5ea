"""Matrix products of Linear for some tens of tokens: every weight is read once, and dequantized in
registers on its way to the tensor cores.

With SWAP the weight is the left operand, so that 64 of its rows, and not of the few tokens, fill
the instruction of a Hopper GPU. SPLIT programs share the K of a tile; the last of them to finish
adds their sums, in order, so results do not depend on which that is.
"""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import prefetch
from slipstream.plugins.gated_mlp.cuda_kernels import gate_up_of


@triton.jit
def product(w, x, acc, SWAP: tl.constexpr, WIDEN: tl.constexpr):
    """acc + the product of w [BN, k] and x [BM, k]: [BN, BM] with SWAP, or [BM, BN]."""
    if WIDEN:  # Triton's interpreter cannot multiply bfloat16
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(w), acc)


@triton.jit
def float8_bits(codes):
    """float8_e4m3 codes in uint8 as float16, for GPUs without that type."""
    wide = codes.to(tl.int16)
    # With one more bit of exponent, the same bits are 2**8 too small.
    bits = ((wide & 128) << 8) | ((wide & 127) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def narrow(w, x):
    """w in x's type; float8 by way of float16, which GPUs convert fastest."""
    if w.dtype != x.dtype:
        if w.dtype == tl.uint8:
            w = float8_bits(w)
        elif w.dtype == tl.float8e4nv:
            w = w.to(tl.float16)
        if w.dtype != x.dtype:
            w = w.to(tl.float32)
        w = w.to(x.dtype)
    return w


@triton.jit
def along(values, ROWS: tl.constexpr):
    """A vector as a column (ROWS) or a row of a matrix."""
    return values[:, None] if ROWS else values[None, :]


@triton.jit
def epilogue(
    acc, up, inverse, y, row_scale, bias, residual, m, n, tokens, width,
    SWAP: tl.constexpr, GATED: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    inside_n = n < width
    if NORM:
        acc = acc * along(inverse, not SWAP)
        if GATED:
            up = up * along(inverse, not SWAP)
    if SCALE:
        acc = acc * along(tl.load(row_scale + n, mask=inside_n, other=0.0).to(tl.float32), SWAP)
        if GATED:
            scales = tl.load(row_scale + width + n, mask=inside_n, other=0.0).to(tl.float32)
            up = up * along(scales, SWAP)
    if BIAS:
        acc += along(tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32), SWAP)
        if GATED:
            biases = tl.load(bias + width + n, mask=inside_n, other=0.0).to(tl.float32)
            up += along(biases, SWAP)
    if GATED:
        acc = gate_up_of(acc, up, GATED)
    at = along(m, not SWAP) * width + along(n, SWAP)
    inside = along(m < tokens, not SWAP) & along(inside_n, SWAP)
    if RESIDUAL:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    acc, up, inverse, y, row_scale, bias, residual, counters, partial, m, n, tokens, width,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    GATED: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    if SPLIT == 1:
        epilogue(
            acc, up, inverse, y, row_scale, bias, residual, m, n, tokens, width,
            SWAP, GATED, SCALE, BIAS, RESIDUAL, NORM,
        )  # fmt: skip
    else:
        tiles = tl.num_programs(0) * tl.num_programs(1)
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        SIZE: tl.constexpr = BM * BN
        BOTH: tl.constexpr = 2 if GATED else 1
        local = along(tl.arange(0, BN), SWAP) + along(tl.arange(0, BM), not SWAP) * BN
        mine = partial + (tl.program_id(2) * tiles + tile) * (BOTH * SIZE)
        tl.store(mine + local, acc)
        if GATED:
            tl.store(mine + SIZE + local, up)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(counters + tile, 0)
            acc = tl.zeros_like(acc)
            up = tl.zeros_like(up)
            for s in range(SPLIT):
                theirs = partial + (s * tiles + tile) * (BOTH * SIZE)
                acc += tl.load(theirs + local, cache_modifier=".cg")
                if GATED:
                    up += tl.load(theirs + SIZE + local, cache_modifier=".cg")
            epilogue(
                acc, up, inverse, y, row_scale, bias, residual, m, n, tokens, width,
                SWAP, GATED, SCALE, BIAS, RESIDUAL, NORM,
            )  # fmt: skip


@triton.jit
def _normed(tile, gain, k, squares, K: tl.constexpr):
    """x [BM, k] times the norm's weight, in x's type; and the sums of squares of its rows."""
    values = tile.to(tl.float32)
    squares += tl.sum(values * values, axis=1)
    gains = tl.load(gain + k, mask=k < K, other=0.0)
    return (values * gains.to(tl.float32)[None, :]).to(tile.dtype), squares


@triton.jit
def _tile(BM: tl.constexpr):
    """The tile of rows of the weight, and of tokens, that a program computes.

    Of many tokens, programs that run together share eight tiles of tokens, so that weights are read
    from memory once for all of them.
    """
    row, column = tl.program_id(0), tl.program_id(1)
    if BM == 128:
        rows = tl.num_programs(0)
        place = column * rows + row
        first = place // (8 * rows) * 8
        wide = tl.minimum(tl.num_programs(1) - first, 8)
        row = place % (8 * rows) // wide
        column = first + place % (8 * rows) % wide
    return row, column


@triton.jit
def _sums_float(
    w_at, up_at, x_at, scale, gain, row, width, m, tokens, split,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    SWAP: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products over a split of K: of gates (or all), of ups, and the sums of squares of x.

    BLOCKS: blocks of a scale along K, 0 where none lies in the loop.
    """
    k = tl.arange(0, BK)
    shape: tl.constexpr = [BN, BM] if SWAP else [BM, BN]
    acc = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for step in range(0, STEPS):
        base = (split * STEPS + step) * BK
        inside = (base + k < K)[None, :]
        if EVEN:
            xs = tl.load(x_at + base, mask=(m < tokens)[:, None], other=0.0)
            w = tl.load(w_at + base)
        else:
            xs = tl.load(x_at + base, mask=(m < tokens)[:, None] & inside, other=0.0)
            w = tl.load(w_at + base, mask=inside, other=0.0)
        if GATED and EVEN:
            w_up = tl.load(up_at + base)
        elif GATED:
            w_up = tl.load(up_at + base, mask=inside, other=0.0)
        if NORM:
            xs, squares = _normed(xs, gain, base + k, squares, K)
        w = narrow(w, xs)
        if GATED:
            w_up = narrow(w_up, xs)
        if BLOCKS:
            factor = tl.load(scale + (row // 128) * BLOCKS + tl.minimum(base // 128, BLOCKS - 1))
            acc += product(w, xs, tl.zeros(shape, tl.float32), SWAP, WIDEN) * along(factor, SWAP)
            if GATED:
                factor = tl.load(
                    scale + ((row + width) // 128) * BLOCKS + tl.minimum(base // 128, BLOCKS - 1)
                )
                up += product(w_up, xs, tl.zeros(shape, tl.float32), SWAP, WIDEN) * along(
                    factor, SWAP
                )
        else:
            acc = product(w, xs, acc, SWAP, WIDEN)
            if GATED:
                up = product(w_up, xs, up, SWAP, WIDEN)
    return acc, up, squares


@triton.jit(do_not_specialize=["tokens"])
def dot_float(
    x, weight, scale, bias, residual, gain, y, counters, partial, x_scale, tokens, N, eps,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, SERIAL: tl.constexpr, SWAP: tl.constexpr,
    SCALE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A 16-bit or float8 weight [N, K]; grid (tiles of N, tiles of tokens, SPLIT).

    x is of 16-bit floats, or with x_scale float32 [tokens] of float8, as the weight is.
    SCALE is "none", "row" or "block" (of 128 x 128: then BK divides 128, and BN or 128 the other).
    EVEN: K is SPLIT * SERIAL whole ranges of whole steps. A program adds up SERIAL of them, one of
    which is 1. Unless SPLIT is 1: counters int32, a zero a tile, and left so; partial
    float32 [SPLIT, tiles, 1 or with GATED 2, BM, BN].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    width = N // 2 if GATED else N
    row_tile, tile = _tile(BM)
    n = row_tile * BN + tl.arange(0, BN)
    m = tile * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    row = tl.minimum(n, width - 1)
    STEPS: tl.constexpr = ((K + BK - 1) // BK + SPLIT * SERIAL - 1) // (SPLIT * SERIAL)
    BLOCKS: tl.constexpr = (K + 127) // 128 if SCALE == "block" else 0
    w_at = weight + row.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + m[:, None] * K + k[None, :]
    up_at = w_at + width.to(tl.int64) * K
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    if PDL:
        ahead = tl.program_id(2) * (STEPS * BK) + tl.arange(0, 4) * LINE
        prefetch(weight + row.to(tl.int64)[:, None] * K + tl.minimum(ahead, K - 1)[None, :])
        tl.extra.cuda.gdc_wait()
    acc, up, squares = _sums_float(
        w_at, up_at, x_at, scale, gain, row, width, m, tokens, tl.program_id(2),
        K, BM, BN, BK, STEPS, SWAP, BLOCKS, GATED, NORM, EVEN, WIDEN,
    )  # fmt: skip
    if SERIAL > 1:
        for split in range(1, SERIAL):
            more, more_up, _ = _sums_float(
                w_at, up_at, x_at, scale, gain, row, width, m, tokens, split,
                K, BM, BN, BK, STEPS, SWAP, BLOCKS, GATED, NORM, EVEN, WIDEN,
            )  # fmt: skip
            acc += more
            up += more_up
    inverse = squares
    if NORM:
        inverse = tl.rsqrt(squares / K + eps)
    if x_scale is not None:
        inverse = tl.load(x_scale + m, mask=m < tokens, other=0.0)
    _finish(
        acc, up, inverse, y, scale, bias, residual, counters, partial, m, n, tokens, width,
        BM, BN, SPLIT, SWAP, GATED, SCALE == "row", BIAS, RESIDUAL,
        NORM or x_scale is not None,
    )  # fmt: skip


@triton.jit
def _move(words, CODES: tl.constexpr):
    """Words shifted right by 4 * CODES bits; to the left if that is negative."""
    if CODES < 0:
        words = words << (-4 * CODES)
    elif CODES > 0:
        words = words >> (4 * CODES)
    return words


@triton.jit
def _in_mantissa(words, PLACE: tl.constexpr, COMPILED: tl.constexpr):
    """The four bits at PLACE, 12 or 16, plus 2**(23 - PLACE), as a float32."""
    if COMPILED and PLACE == 16:  # one instruction, where the compiler takes two
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0000, 0x43000000, 0xEA;", "=r,r", [words], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    elif COMPILED:
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF000, 0x45000000, 0xEA;", "=r,r", [words], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    elif PLACE == 16:
        bits = (words & 0xF0000) | 0x43000000
    else:
        bits = (words & 0xF000) | 0x45000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def float4(words, i: tl.constexpr):
    """The float4_e2m1 at code i of words, times 2**-126, as a float32: its exponent and mantissa
    are the last bit pair and the first bit of that type's, where the least are denormal too."""
    sign = (words << (28 - 4 * i)) & -2147483648
    moved = words << (22 - 4 * i) if i < 6 else words >> (4 * i - 22)
    size = moved & 0x01C00000
    return (sign | size).to(tl.float32, bitcast=True)


@triton.jit
def power(exponents):
    """float8_e8m0fnu up to 2**64, as bytes, times 2**63: what is left of a scale where a ``float4``
    has been multiplied by 2**63."""
    return (((exponents & 255) + 63) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode(
    words, i: tl.constexpr, scale, shift, row_start, group, GROUPS: tl.constexpr,
    DTYPE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    COMPILED: tl.constexpr, scales=None,
):  # fmt: skip
    """Weights [BN, 32] of code i of a chunk's words; GROUP 0 leaves their scale to the epilogue.

    A code moved into the mantissa of 2**7 or 2**11 is that number plus the code. ``scales`` are the
    float16 scales of the chunk in an integer a row, where they have been loaded.
    """
    if ZERO == "e2m1":
        place = row_start + tl.minimum(group + i, GROUPS - 1)
        factor = power(tl.load(scale + place).to(tl.int32))
        return (float4(words, i) * 2.0**63 * factor[:, None]).to(DTYPE)
    if BITS == 8:
        codes = ((words >> (8 * i)) & 255).to(tl.float32)
        zero = 0.0
    elif i == 7 or i % 2 == 0:
        codes = _in_mantissa(_move(words, i - 4), 16, COMPILED)
        zero = 128.0
    else:
        codes = _in_mantissa(_move(words, i - 3), 12, COMPILED)
        zero = 2048.0
    if ZERO == "midpoint":
        zero += 2.0 ** (BITS - 1)
    if GROUP:
        # Codes of padding, whose x is zero, have no group: any finite scale will do for them.
        place = row_start + tl.minimum(group + i * 32 // GROUP, GROUPS - 1)
        if scales is not None:
            bits = (scales >> (16 * (i * 32 // GROUP))).to(tl.int16)
            factor = bits.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            factor = tl.load(scale + place).to(tl.float32)
        if ZERO == "zero":
            zero += tl.load(shift + place).to(tl.float32)
        begin = -zero * factor
        if ZERO == "offset":
            begin += tl.load(shift + place).to(tl.float32)
        values = codes * factor[:, None] + begin[:, None]
    else:
        values = codes - zero
    return values.to(DTYPE)


@triton.constexpr_function
def float4_instructions(i: int, whole: bool = True) -> str:
    """Moves the float4_e2m1 at code i of two words into exponents and mantissas of two bfloat16,
    where they are 2**126 too small, and multiplies if ``whole`` by 2**63, and by a factor that has
    the rest.

    Before sm_90 there is no ``mul``: -0.0 added to a product leaves its bits as they are."""
    low = i % 4
    align = f"shl.b32 m, a, {6 - 4 * low};" if low < 2 else f"shr.b32 m, a, {4 * low - 6};"
    return (
        "{ .reg .b32 a, m, c, z; mov.b32 c, 0x5F005F00; mov.b32 z, 0x80008000;"
        f"prmt.b32 a, $1, $2, {'0x5410' if i < 4 else '0x7632'};"
        f"{align} and.b32 m, m, 0x01C001C0; shl.b32 a, a, {12 - 4 * low};"
        "lop3.b32 a, a, 0x80008000, m, 0xEA;"
        f"{'fma.rn.bf16x2 a, a, c, z; ' if whole else ''}fma.rn.bf16x2 $0, a, $3, z; }}"
    )


@triton.jit
def decode_float4(words, i: tl.constexpr, exponents, DTYPE: tl.constexpr, COMPILED: tl.constexpr):
    """As ``decode``, of float4 and the exponents of a chunk, the bytes of an int64 a row."""
    bits = ((exponents >> (8 * i)) & 255).to(tl.int32) + 63
    if COMPILED and DTYPE == tl.bfloat16:  # noqa: SIM300 - which is no constant
        factor = (bits << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
        values = tl.inline_asm_elementwise(
            float4_instructions(i), "=r,r,r,r", [words, factor[:, None]], dtype=tl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        factor = (bits << 23).to(tl.float32, bitcast=True)
        values = (float4(words, i) * 2.0**63 * factor[:, None]).to(DTYPE)
    return values


@triton.constexpr_function
def groups_of(K: int, CHUNKS: int, GROUP: int, ZERO: str) -> int:
    """The scales that are stored of a row; those of float4 are of whole chunks."""
    if ZERO == "e2m1":
        return CHUNKS * 8
    return K // GROUP if GROUP else 1


@triton.jit
def _sums_int(
    w_at, up_at, x_at, scale, shift, gain, row, width, m, tokens, split,
    K: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    SWAP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """As ``_sums_float``, of chunks of codes."""
    CODES: tl.constexpr = 32 // BITS
    COUNT: tl.constexpr = CODES * 32 // GROUP if GROUP else 1
    GROUPS: tl.constexpr = groups_of(K, CHUNKS, GROUP, ZERO)
    j = tl.arange(0, 32)
    shape: tl.constexpr = [BN, BM] if SWAP else [BM, BN]
    acc = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for step in range(0, STEPS):
        chunk = split * STEPS + step
        stored = chunk if EVEN else tl.minimum(chunk, CHUNKS - 1)
        words = tl.load(w_at + stored * 32)
        if GATED:
            up_words = tl.load(up_at + stored * 32)
        for i in tl.static_range(CODES):
            k = (chunk * CODES + i) * 32 + j
            inside = (m < tokens)[:, None]
            if not EVEN:
                inside = inside & (k < K)[None, :]
            xs = tl.load(x_at + (chunk * CODES + i) * 32, mask=inside, other=0.0)
            if NORM:
                xs, squares = _normed(xs, gain, k, squares, K)
            w = decode(
                words, i, scale, shift, row * GROUPS, stored * COUNT, GROUPS,
                DTYPE, BITS, GROUP, ZERO, not WIDEN,
            )  # fmt: skip
            acc = product(w, xs, acc, SWAP, WIDEN)
            if GATED:
                w = decode(
                    up_words, i, scale, shift, (row + width) * GROUPS, stored * COUNT, GROUPS,
                    DTYPE, BITS, GROUP, ZERO, not WIDEN,
                )  # fmt: skip
                up = product(w, xs, up, SWAP, WIDEN)
    return acc, up, squares


@triton.jit(do_not_specialize=["tokens"])
def dot_int(
    x, weight, scale, shift, bias, residual, gain, y, counters, partial, tokens, N, eps,
    K: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr, SERIAL: tl.constexpr, SWAP: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A weight [N, chunks * 32 words], a chunk a step, a product a code of its words.

    GROUP 0 is a scale a row; ZERO as in ``gemv_int``; EVEN: no chunk is padded and SPLIT * SERIAL
    divides CHUNKS. Grid, SERIAL, counters and partial as in ``dot_float``.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    COUNT: tl.constexpr = 32 // BITS * 32 // GROUP if GROUP else 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    width = N // 2 if GATED else N
    row_tile, tile = _tile(BM)
    n = row_tile * BN + tl.arange(0, BN)
    m = tile * BM + tl.arange(0, BM)
    j = tl.arange(0, 32)
    row = tl.minimum(n, width - 1)
    STEPS: tl.constexpr = (CHUNKS + SPLIT * SERIAL - 1) // (SPLIT * SERIAL)
    w_at = weight + row.to(tl.int64)[:, None] * (CHUNKS * 32) + j[None, :]
    up_at = w_at + width.to(tl.int64) * (CHUNKS * 32)
    x_at = x + m[:, None] * K + j[None, :]
    if PDL:
        start = tl.program_id(2) * STEPS
        lines = tl.minimum(start + tl.arange(0, 4), CHUNKS - 1) * 32
        prefetch(weight + row.to(tl.int64)[:, None] * (CHUNKS * 32) + lines[None, :])
        if GROUP:
            prefetch(scale + row * groups_of(K, CHUNKS, GROUP, ZERO) + start * COUNT)
        tl.extra.cuda.gdc_wait()
    acc, up, squares = _sums_int(
        w_at, up_at, x_at, scale, shift, gain, row, width, m, tokens, tl.program_id(2),
        K, CHUNKS, BM, BN, STEPS, SWAP, BITS, GROUP, ZERO, DTYPE, GATED, NORM, EVEN, WIDEN,
    )  # fmt: skip
    if SERIAL > 1:
        for split in range(1, SERIAL):
            more, more_up, _ = _sums_int(
                w_at, up_at, x_at, scale, shift, gain, row, width, m, tokens, split,
                K, CHUNKS, BM, BN, STEPS, SWAP, BITS, GROUP, ZERO, DTYPE, GATED, NORM, EVEN, WIDEN,
            )  # fmt: skip
            acc += more
            up += more_up
    inverse = tl.rsqrt(squares / K + eps) if NORM else squares
    _finish(
        acc, up, inverse, y, scale, bias, residual, counters, partial, m, n, tokens, width,
        BM, BN, SPLIT, SWAP, GATED, GROUP == 0, BIAS, RESIDUAL, NORM,
    )  # fmt: skip
