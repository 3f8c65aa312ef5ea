"""Products with the weights of experts, in Triton: the loops of Linear's kernels, on rows that are
grouped by expert."""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin
from slipstream.plugins.linear.cuda.kernels.dot import (
    along,
    decode,
    epilogue,
    groups_of,
    narrow,
    product,
)
from slipstream.plugins.linear.cuda.kernels.gemv import gemv_float, gemv_int


@triton.jit(do_not_specialize=["pairs"])
def group_pairs(
    ids, order, ends, tile_experts, tile_firsts, total, pairs,
    EXPERTS: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Pairs (a token and one of its experts) in the order of their experts; a program an expert.

    order int32 [pairs]; ends int32 [EXPERTS], where each expert's pairs end in it. Every expert's
    pairs are cut into tiles of BM: of each tile its expert and its first place; and their number.
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
    tiles = (counts + BM - 1) // BM
    first_tile = tl.sum(tl.where(before, tiles, 0), axis=0)
    own = tl.sum(tl.where(experts == mine, counts, 0), axis=0)
    place = start
    for base in range(0, pairs, BLOCK):
        at = base + tl.arange(0, BLOCK)
        here = (tl.load(ids + at, at < pairs, -1) == mine).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, axis=0) - 1, at, here == 1)
        place += tl.sum(here, axis=0)
    own_tiles = (own + BM - 1) // BM
    for tile in range(0, own_tiles):
        tl.store(tile_experts + first_tile + tile, mine)
        tl.store(tile_firsts + first_tile + tile, start + tile * BM)
    tl.store(ends + mine, start + own)
    if mine == EXPERTS - 1:
        tl.store(total, first_tile + own_tiles)


@triton.jit
def _rows(order, ends, tile_experts, tile_firsts, pairs, BM: tl.constexpr):
    """The expert of this program's tile, and its pairs; beyond them, the number of all."""
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    places = tl.load(tile_firsts + tile) + tl.arange(0, BM)
    valid = places < tl.load(ends + expert)
    return expert.to(tl.int64), tl.load(order + places, valid, pairs)


@triton.jit(do_not_specialize=["pairs"])
def expert_dot_float(
    order, ends, tile_experts, tile_firsts, total, x, weight, scale, bias, y, pairs, N,
    K: tl.constexpr, PER_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, SCALE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """16-bit or float8 weights [experts * N, K]; grid (tiles of N, tiles of pairs).

    PER_ROW pairs share a row of x. SCALE and BK as in ``dot_float``; y [pairs, N] or, GATED,
    [pairs, N / 2].
    """
    begin(PDL)
    if tl.program_id(1) < tl.load(total):
        expert, pair = _rows(order, ends, tile_experts, tile_firsts, pairs, BM)
        width = N // 2 if GATED else N
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        row = tl.minimum(n, width - 1)
        w_at = weight + (expert * N + row)[:, None] * K + k[None, :]
        up_at = w_at + width.to(tl.int64) * K
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
            w = narrow(w, xs)
            if GATED:
                w_up = narrow(tl.load(up_at + base, mask=inside, other=0.0), xs)
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
        epilogue(
            acc, up, acc, y, scales, biases, y, pair, n, pairs, width,
            SWAP, GATED, SCALE == "row", BIAS, False, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def expert_dot_int(
    order, ends, tile_experts, tile_firsts, total, x, weight, scale, shift, bias, y, pairs, N,
    K: tl.constexpr, CHUNKS: tl.constexpr, PER_ROW: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SWAP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights [experts * N, chunks * 32 words], as ``dot_int`` reads them."""
    begin(PDL)
    if tl.program_id(1) < tl.load(total):
        expert, pair = _rows(order, ends, tile_experts, tile_firsts, pairs, BM)
        CODES: tl.constexpr = 32 // BITS
        COUNT: tl.constexpr = CODES * 32 // GROUP if GROUP else 1
        DTYPE: tl.constexpr = x.dtype.element_ty
        GROUPS: tl.constexpr = groups_of(K, CHUNKS, GROUP, ZERO)
        width = N // 2 if GATED else N
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        j = tl.arange(0, 32)
        row = expert * N + tl.minimum(n, width - 1)
        w_at = weight + row[:, None] * (CHUNKS * 32) + j[None, :]
        up_at = w_at + width.to(tl.int64) * (CHUNKS * 32)
        x_at = x + (pair // PER_ROW).to(tl.int64)[:, None] * K + j[None, :]
        shape: tl.constexpr = [BN, BM] if SWAP else [BM, BN]
        acc = tl.zeros(shape, tl.float32)
        up = tl.zeros(shape, tl.float32)
        for chunk in range(0, CHUNKS):
            words = tl.load(w_at + chunk * 32)
            if GATED:
                up_words = tl.load(up_at + chunk * 32)
            for i in tl.static_range(CODES):
                k = (chunk * CODES + i) * 32 + j
                inside = (pair < pairs)[:, None]
                if not EVEN:
                    inside = inside & (k < K)[None, :]
                xs = tl.load(x_at + (chunk * CODES + i) * 32, mask=inside, other=0.0)
                w = decode(
                    words, i, scale, shift, row * GROUPS, chunk * COUNT, GROUPS,
                    DTYPE, BITS, GROUP, ZERO, not WIDEN,
                )  # fmt: skip
                acc = product(w, xs, acc, SWAP, WIDEN)
                if GATED:
                    w = decode(
                        up_words, i, scale, shift, (row + width) * GROUPS, chunk * COUNT, GROUPS,
                        DTYPE, BITS, GROUP, ZERO, not WIDEN,
                    )  # fmt: skip
                    up = product(w, xs, up, SWAP, WIDEN)
        biases = bias + expert * N if BIAS else bias
        row_scales = scale + expert * N if GROUP == 0 else scale
        epilogue(
            acc, up, acc, y, row_scales, biases, y, pair, n, pairs, width,
            SWAP, GATED, GROUP == 0, BIAS, False, False,
        )  # fmt: skip


@triton.jit
def expert_gemv_float(
    ids, x, weight, scale, bias, y, N,
    K: tl.constexpr, VECTORS: tl.constexpr, PER_ROW: tl.constexpr, BR: tl.constexpr,
    RT: tl.constexpr, Q: tl.constexpr, DEPTH: tl.constexpr, FP8: tl.constexpr,
    NATIVE: tl.constexpr, BF16: tl.constexpr, GATED: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair each along the second axis of the grid; the rest is ``gemv_float`` of one token."""
    begin(PDL)
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    BLOCKS: tl.constexpr = (K + 127) // 128
    scales = scale
    if SCALE == "row":
        scales = scale + expert * N
    elif SCALE == "block":
        scales = scale + expert * (N // 128) * BLOCKS
    biases = bias + expert * N if BIAS else bias
    width = N // 2 if GATED else N
    gemv_float(
        x + pair // PER_ROW * (K // 4), weight + expert * N * (VECTORS * 2), scales, biases, y, x,
        y + pair * width, N, 0.0, K, VECTORS, 1, BR, RT, Q, DEPTH, FP8, NATIVE, BF16, GATED,
        SCALE, BIAS, False, False, EVEN, COMPILED, False,
    )  # fmt: skip


@triton.jit
def expert_gemv_int(
    ids, x, weight, scale, shift, bias, y, N,
    K: tl.constexpr, VECTORS: tl.constexpr, PER_ROW: tl.constexpr, BR: tl.constexpr,
    RT: tl.constexpr, Q: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BF16: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair each along the second axis of the grid; the rest is ``gemv_int`` of one token."""
    begin(PDL)
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    # The exponents of a chunk of float4 are one number.
    GROUPS: tl.constexpr = VECTORS // 8 if ZERO == "e2m1" else groups_of(K, 0, GROUP, ZERO)
    biases = bias + expert * N if BIAS else bias
    shifts = shift + expert * N * GROUPS if ZERO == "zero" or ZERO == "offset" else shift
    width = N // 2 if GATED else N
    gemv_int(
        x + pair // PER_ROW * (K // 4), weight + expert * N * (VECTORS * 2),
        scale + expert * N * GROUPS, shifts, biases, y, x, y + pair * width, N, 0.0,
        K, VECTORS, 1, BR, RT, Q, DEPTH, BITS, GROUP, ZERO, BF16, GATED, BIAS, False, False,
        EVEN, COMPILED, False,
    )  # fmt: skip


@triton.jit
def add_products(
    products, weights, residual, y, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The products [T * TOP_K, WIDTH] of a token times their weights, in order, plus residual."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        part = tl.load(products + (token * TOP_K + k) * WIDTH + at, inside, 0.0).to(tl.float32)
        total += part * tl.load(weights + token * TOP_K + k)
    if RESIDUAL:
        total += tl.load(residual + token * WIDTH + at, inside, 0.0).to(tl.float32)
    tl.store(y + token * WIDTH + at, total.to(y.dtype.element_ty), inside)
