"""Products with the weights of experts, in Triton: the loops of Linear's kernels, on rows that are
grouped by expert."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin
from slipstream.plugins.linear.cuda.kernels.dot import (
    along,
    decode,
    decode_float4,
    epilogue,
    groups_of,
    narrow,
    product,
)
from slipstream.plugins.linear.cuda.kernels.gemv import gemv_float, gemv_int


@triton.jit
def _cut(
    row, counts, own, mine, length, BM: tl.constexpr, EXPERTS: tl.constexpr, ALL: tl.constexpr
):
    """Stores the tiles of BM pairs of an expert, and if it is the last the number of all."""
    before = tl.arange(0, ALL) < mine
    first = tl.sum(tl.where(before, (counts + BM - 1) // BM, 0), axis=0)
    own_tiles = (own + BM - 1) // BM
    for base in range(0, own_tiles, 32):
        tile = base + tl.arange(0, 32)
        tl.store(row + 4 + first + tile, tile * 0 + mine, tile < own_tiles)
        tl.store(row + 4 + length + first + tile, tile * 0 + first, tile < own_tiles)
    if mine == EXPERTS - 1:
        tl.store(row, first + own_tiles)


@triton.jit(do_not_specialize=["pairs", "length"])
def group_pairs(
    ids, order, bounds, tiles, pairs, length,
    EXPERTS: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
    SIZES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pairs (a token and one of its experts) in the order of their experts; a program an expert.

    order int32 [pairs]; bounds int32 [EXPERTS + 1], between which each expert's pairs are in it.
    Every expert's pairs are cut into tiles of LEAST, of twice as many, and so on: tiles int32
    [SIZES, 4 + 2 * length] has their number and, from 4 on, the expert of each, and then its
    expert's first tile.
    """
    begin(PDL)
    mine = tl.program_id(0)
    experts = tl.arange(0, ALL)
    counts = tl.zeros([ALL], tl.int32)
    for base in range(0, pairs, BLOCK):
        at = base + tl.arange(0, BLOCK)
        found = tl.load(ids + at, at < pairs, 0)
        counts += tl.histogram(found, ALL, at < pairs)
    before = experts < mine
    start = tl.sum(tl.where(before, counts, 0), axis=0)
    own = tl.sum(tl.where(experts == mine, counts, 0), axis=0)
    place = start
    for base in range(0, pairs, BLOCK):
        at = base + tl.arange(0, BLOCK)
        here = (tl.load(ids + at, at < pairs, -1) == mine).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, axis=0) - 1, at, here == 1)
        place += tl.sum(here, axis=0)
    tl.store(bounds + mine, start)
    if mine == EXPERTS - 1:
        tl.store(bounds + EXPERTS, start + own)
    for size in tl.static_range(SIZES):
        row = tiles + size * (4 + 2 * length)
        _cut(row, counts, own, mine, length, LEAST << size, EXPERTS, ALL)


@triton.jit
def _begin(PDL: tl.constexpr, ALONE: tl.constexpr):
    if ALONE:
        _begin_product(PDL)
    else:
        begin(PDL)


@triton.jit
def _count(tiles, pairs, ALONE: tl.constexpr):
    """How many tiles of pairs there are."""
    return pairs if ALONE else tl.load(tiles)


@triton.jit
def _tile(
    order, bounds, tiles, length, pairs, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """The expert of this program, its pairs (beyond them, the number of all) and its first column.

    An expert's programs are neighbours, and among them those that read the same part of its weight.
    ALONE: every pair is a tile, and ``order`` the experts of pairs.
    """
    PARTS: tl.constexpr = (WIDTH + BN - 1) // BN
    if ALONE:
        slot = tl.program_id(0) // PARTS
        pair = tl.where(tl.arange(0, BM) == 0, slot, pairs)
        return tl.load(order + slot).to(tl.int64), pair, tl.program_id(0) % PARTS * BN
    slot = tl.program_id(0) // PARTS
    expert = tl.load(tiles + 4 + slot)
    first = tl.load(tiles + 4 + length + slot)
    start = tl.load(bounds + expert)
    end = tl.load(bounds + expert + 1)
    count = (end - start + BM - 1) // BM
    place = tl.program_id(0) - first * PARTS
    at = start + place % count * BM + tl.arange(0, BM)
    pair = tl.load(order + at, at < end, pairs)
    return expert.to(tl.int64), pair, place // count * BN


@triton.jit(do_not_specialize=["pairs", "length"])
def expert_dot_float(
    order, bounds, tiles, length, x, weight, scale, bias, y, x_scale, pairs,
    N: tl.constexpr, K: tl.constexpr, PER_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SWAP: tl.constexpr, SCALE: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """16-bit or float8 weights [experts * N, K]; a program a tile of pairs and of N, in one axis.

    PER_ROW pairs share a row of x. SCALE, BK and x_scale as in ``dot_float``; y [pairs, N] or,
    GATED, [pairs, N / 2]; the rest as in ``group_pairs``.
    """
    _begin(PDL, ALONE)
    width: tl.constexpr = N // 2 if GATED else N
    if tl.program_id(0) < _count(tiles, pairs, ALONE) * ((width + BN - 1) // BN):
        expert, pair, first = _tile(order, bounds, tiles, length, pairs, width, BM, BN, ALONE)
        n = first + tl.arange(0, BN)
        k = tl.arange(0, BK)
        row = tl.minimum(n, width - 1)
        w_at = weight + expert * (N * K) + row.to(tl.int64)[:, None] * K + k[None, :]
        up_at = w_at + width * K
        x_at = x + (pair // PER_ROW).to(tl.int64)[:, None] * K + k[None, :]
        BLOCKS: tl.constexpr = (K + 127) // 128
        scales = scale
        if SCALE == "row":
            scales = scale + expert * N
        elif SCALE == "block":
            scales = scale + expert * (N // 128) * BLOCKS
        shape: tl.constexpr = [BN, BM] if SWAP else [BM, BN]
        acc = tl.zeros(shape, tl.float32)
        up = tl.zeros(shape, tl.float32)
        for base in range(0, K, BK):
            inside = (base + k < K)[None, :]
            if EVEN:
                xs = tl.load(x_at + base, mask=(pair < pairs)[:, None], other=0.0)
                w = tl.load(w_at + base)
            else:
                xs = tl.load(x_at + base, mask=(pair < pairs)[:, None] & inside, other=0.0)
                w = tl.load(w_at + base, mask=inside, other=0.0)
            if GATED and EVEN:
                w_up = tl.load(up_at + base)
            elif GATED:
                w_up = tl.load(up_at + base, mask=inside, other=0.0)
            w = narrow(w, xs)
            if GATED:
                w_up = narrow(w_up, xs)
            if SCALE == "block":
                block = base // 128
                factor = tl.load(scales + (row // 128) * BLOCKS + block)
                part = product(w, xs, tl.zeros(shape, tl.float32), SWAP, WIDEN)
                acc += part * along(factor, SWAP)
                if GATED:
                    factor = tl.load(scales + ((row + width) // 128) * BLOCKS + block)
                    part = product(w_up, xs, tl.zeros(shape, tl.float32), SWAP, WIDEN)
                    up += part * along(factor, SWAP)
            else:
                acc = product(w, xs, acc, SWAP, WIDEN)
                if GATED:
                    up = product(w_up, xs, up, SWAP, WIDEN)
        biases = bias + expert * N if BIAS else bias
        inverse = acc
        if x_scale is not None:
            inverse = tl.load(x_scale + pair // PER_ROW, mask=pair < pairs, other=0.0)
        epilogue(
            acc, up, inverse, y, scales, biases, y, pair.to(tl.int64), n, pairs, width,
            SWAP, GATED, SCALE == "row", BIAS, False, x_scale is not None,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "length"])
def expert_dot_int(
    order, bounds, tiles, length, x, weight, scale, shift, bias, y, pairs,
    N: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, PER_ROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PACKED: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Weights [experts * N, chunks * 32 words], as ``dot_int`` reads them.

    PACKED: the scales of a chunk are one integer, which is wide enough to be fetched ahead: those
    of float4 as in ``gemv_int``, float16 ones in 32 or 64 bits.
    """
    _begin(PDL, ALONE)
    width: tl.constexpr = N // 2 if GATED else N
    if tl.program_id(0) < _count(tiles, pairs, ALONE) * ((width + BN - 1) // BN):
        expert, pair, first = _tile(order, bounds, tiles, length, pairs, width, BM, BN, ALONE)
        # Few gates and as many ups are one operand, so that they fill an instruction.
        JOINED: tl.constexpr = GATED > 0 and SWAP and BN < 64
        APART: tl.constexpr = GATED > 0 and not JOINED
        n = first + tl.arange(0, BN)
        CODES: tl.constexpr = 32 // BITS
        COUNT: tl.constexpr = CODES * 32 // GROUP if GROUP else 1
        DTYPE: tl.constexpr = x.dtype.element_ty
        GROUPS: tl.constexpr = groups_of(K, CHUNKS, GROUP, ZERO)
        j = tl.arange(0, 32)
        if JOINED:
            both = tl.arange(0, 2 * BN)
            row = expert * N + tl.minimum(first + both // 2, width - 1) + both % 2 * width
        else:
            row = expert * N + tl.minimum(n, width - 1)
        w_at = weight + row[:, None] * (CHUNKS * 32) + j[None, :]
        up_at = w_at + width * (CHUNKS * 32)
        x_at = x + (pair // PER_ROW).to(tl.int64)[:, None] * K + j[None, :]
        ROWS: tl.constexpr = 2 * BN if JOINED else BN
        shape: tl.constexpr = [ROWS, BM] if SWAP else [BM, ROWS]
        acc = tl.zeros(shape, tl.float32)
        up = tl.zeros(shape, tl.float32)
        for chunk in range(0, CHUNKS):
            words = tl.load(w_at + chunk * 32)
            if APART:
                up_words = tl.load(up_at + chunk * 32)
            scales = None
            up_scales = None
            if PACKED:
                scales = tl.load(scale + row * CHUNKS + chunk)
                if APART:
                    up_scales = tl.load(scale + (row + width) * CHUNKS + chunk)
            for i in tl.static_range(CODES):
                k = (chunk * CODES + i) * 32 + j
                inside = (pair < pairs)[:, None]
                if not EVEN:
                    inside = inside & (k < K)[None, :]
                xs = tl.load(x_at + (chunk * CODES + i) * 32, mask=inside, other=0.0)
                if ZERO == "e2m1":
                    w = decode_float4(words, i, scales, DTYPE, not WIDEN)
                else:
                    w = decode(
                        words, i, scale, shift, row * GROUPS, chunk * COUNT, GROUPS,
                        DTYPE, BITS, GROUP, ZERO, not WIDEN, scales,
                    )  # fmt: skip
                acc = product(w, xs, acc, SWAP, WIDEN)
                if APART:
                    if ZERO == "e2m1":
                        w = decode_float4(up_words, i, up_scales, DTYPE, not WIDEN)
                    else:
                        w = decode(
                            up_words, i, scale, shift, (row + width) * GROUPS, chunk * COUNT,
                            GROUPS, DTYPE, BITS, GROUP, ZERO, not WIDEN, up_scales,
                        )  # fmt: skip
                    up = product(w, xs, up, SWAP, WIDEN)
        if JOINED:
            acc, up = tl.split(acc.reshape(BN, 2, BM).permute(0, 2, 1))
        biases = bias + expert * N if BIAS else bias
        row_scales = scale + expert * N if GROUP == 0 else scale
        epilogue(
            acc, up, acc, y, row_scales, biases, y, pair.to(tl.int64), n, pairs, width,
            SWAP, GATED, GROUP == 0, BIAS, False, False,
        )  # fmt: skip


@triton.jit
def add_products(
    products, weights, residual, y, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The products [T * TOP_K, WIDTH] of every token times their weights, in order, plus residual.
    Grid (tokens, blocks of WIDTH)."""
    begin(PDL)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        part = tl.load(products + (token * TOP_K + k) * WIDTH + at, inside, 0.0).to(tl.float32)
        total += part * tl.load(weights + token * TOP_K + k)
    if RESIDUAL:
        total += tl.load(residual + token * WIDTH + at, inside, 0.0).to(tl.float32)
    tl.store(y + token * WIDTH + at, total.to(y.dtype.element_ty), inside)


@triton.jit
def _begin_product(PDL: tl.constexpr):
    """Lets the next kernel start when what came before this one is finished.

    So a sum that is launched after it may read what chose the experts before it waits.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def expert_gemv_float(
    ids, x, weight, scale, bias, factors, residual, y,
    N: tl.constexpr, PER_ROW: tl.constexpr, SUM: tl.constexpr, RESIDUAL: tl.constexpr,
    K: tl.constexpr, VECTORS: tl.constexpr, BR: tl.constexpr, RT: tl.constexpr, Q: tl.constexpr,
    DEPTH: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr,
    GATED: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    COMPILED: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A pair of a token and an expert along the second axis of the grid, or with SUM a token and
    all its SUM experts; the rest is ``gemv_float`` of one token.

    PER_ROW pairs share a row of x. EARLY: the ids of a sum, and what wrote them, are done before
    the kernel in front of this one.
    """
    which = tl.program_id(1).to(tl.int64)
    width: tl.constexpr = N // 2 if GATED else N
    if SUM:
        if not EARLY:
            begin(PDL)
        gemv_float(
            x + which * (SUM * (K // 4)), weight, scale, bias, residual + which * N if RESIDUAL
            else residual, x, y + which * N, N, 0.0, K, VECTORS, 1, BR, RT, Q, DEPTH, FP8, NATIVE,
            BF16, 0, SCALE, BIAS, RESIDUAL, False, EVEN, COMPILED, EARLY and PDL,
            ids + which * SUM, factors + which * SUM, SUM, SLOTS,
        )  # fmt: skip
    else:
        _begin_product(PDL)
        expert = tl.load(ids + which).to(tl.int64)
        BLOCKS: tl.constexpr = (K + 127) // 128
        scales = scale
        if SCALE == "row":
            scales = scale + expert * N
        elif SCALE == "block":
            scales = scale + expert * (N // 128) * BLOCKS
        biases = bias + expert * N if BIAS else bias
        gemv_float(
            x + which // PER_ROW * (K // 4), weight + expert * (N * VECTORS * 2), scales, biases,
            x, x, y + which * width, N, 0.0, K, VECTORS, 1, BR, RT, Q, DEPTH, FP8, NATIVE, BF16,
            GATED, SCALE, BIAS, False, False, EVEN, COMPILED, False,
        )  # fmt: skip


@triton.jit
def expert_gemv_int(
    ids, x, weight, scale, shift, bias, factors, residual, y,
    N: tl.constexpr, PER_ROW: tl.constexpr, SUM: tl.constexpr, RESIDUAL: tl.constexpr,
    K: tl.constexpr, VECTORS: tl.constexpr, BR: tl.constexpr, RT: tl.constexpr, Q: tl.constexpr,
    DEPTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BF16: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    COMPILED: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """As ``expert_gemv_float``, of ``gemv_int``."""
    which = tl.program_id(1).to(tl.int64)
    width: tl.constexpr = N // 2 if GATED else N
    if SUM:
        if not EARLY:
            begin(PDL)
        gemv_int(
            x + which * (SUM * (K // 4)), weight, scale, shift, bias,
            residual + which * N if RESIDUAL else residual, x, y + which * N, N, 0.0, K, VECTORS,
            1, BR, RT, Q, DEPTH, BITS, GROUP, ZERO, BF16, 0, BIAS, RESIDUAL, False, EVEN, COMPILED,
            EARLY and PDL, ids + which * SUM, factors + which * SUM, SUM, SLOTS,
        )  # fmt: skip
    else:
        _begin_product(PDL)
        expert = tl.load(ids + which).to(tl.int64)
        # The exponents of a chunk of float4 are one number.
        GROUPS: tl.constexpr = VECTORS // 8 if ZERO == "e2m1" else groups_of(K, 0, GROUP, ZERO)
        biases = bias + expert * N if BIAS else bias
        shifts = shift + expert * N * GROUPS if ZERO == "zero" or ZERO == "offset" else shift
        gemv_int(
            x + which // PER_ROW * (K // 4), weight + expert * (N * VECTORS * 2),
            scale + expert * N * GROUPS, shifts, biases, x, x, y + which * width, N, 0.0, K,
            VECTORS, 1, BR, RT, Q, DEPTH, BITS, GROUP, ZERO, BF16, GATED, BIAS, False, False,
            EVEN, COMPILED, False,
        )  # fmt: skip
