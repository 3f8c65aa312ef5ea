"""Attention of prompts over a paged KV cache for Hopper GPUs, in Gluon: ``prefill_kernel`` of
kernels.py where there is neither a window nor a soft cap.

A program works on one block of queries after the other: one warp copies pages into shared memory
by TMA, and two warpgroups of 64 rows each multiply. While a warpgroup's tensor cores add the values
of one tile of keys, it makes softmax weights of the scores of the next one. Scores are kept in
units of log 2, so that ``exp2`` is the softmax's exponential.

Keys of float8 pages are multiplied as they are, by queries in two codes (``hopper_codes``). Values
a third warpgroup decodes into tiles of float16.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from slipstream.plugins.paged_attention.cuda.hopper_codes import store_codes

LOG2_E = gl.constexpr(1.4426950408889634)
# A running maximum before the first key: finite, so that a difference of two is never NaN.
NO_KEY = gl.constexpr(-1e30)
ROWS = gl.constexpr(64)  # queries times heads of a warpgroup
SWIZZLE = gl.constexpr(128)  # bytes of a row in shared memory, hence of one copy
EIGHT = gl.constexpr(8)  # keys, after which the swizzle repeats
NO_ROW = gl.constexpr(-(1 << 20))  # where a copy finds zeros
_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def part_of_page(
    page: int, head_dim: int, dtype: torch.dtype
) -> tuple[list[int], gl.NVMMASharedLayout]:
    """What one copy takes of ``page`` keys or values, and how it lies in shared memory."""
    part = [page, min(SWIZZLE.value // dtype.itemsize, head_dim)]
    return part, gl.NVMMASharedLayout.get_default_for(part, _TYPES[dtype])


class Shape(NamedTuple):
    """What the kernel is compiled for; ``width`` are the numbers of a token in qkv."""

    num_heads: gl.constexpr
    num_kv_heads: gl.constexpr
    head_dim: gl.constexpr
    width: gl.constexpr
    page: gl.constexpr
    block_q: gl.constexpr
    block_n: gl.constexpr


class Step(NamedTuple):
    """Where the step's sequences and blocks of queries are described; ``blocks``: how many there
    are for all groups of heads."""

    query_start: gl.tensor
    context_len: gl.tensor
    page_table: gl.tensor
    table_stride: gl.tensor
    block_sequence: gl.tensor
    block_start: gl.tensor
    blocks: gl.tensor


class Ring(NamedTuple):
    """Tiles in shared memory; a phase of ``ready`` ends when one has come, one of ``free`` when
    all its readers have read it."""

    tiles: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Block(NamedTuple):
    """A block of queries for a group of heads; without ``tiles`` there is nothing to do."""

    kv_head: gl.tensor
    sequence: gl.tensor
    first_token: gl.tensor
    queries: gl.tensor
    start: gl.tensor
    past: gl.tensor
    tiles: gl.tensor


@gluon.jit
def await_tile(ring, n):
    """The place of the program's tile ``n``, which has come."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.ready.index(n % STAGES), n // STAGES & 1)
    return n % STAGES


@gluon.jit
def await_space(ring, n):
    """The place of the program's tile ``n``, which all that was there before has left."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.free.index(n % STAGES), (n // STAGES & 1) ^ 1)
    return n % STAGES


@gluon.jit
def number_of(wave):
    """The number of this program's block in a wave; every other wave runs backwards, since the
    blocks are sorted by the work that they are."""
    programs = gl.num_programs(0)
    turn = gl.program_id(0)
    if wave % 2 == 1:
        turn = programs - 1 - turn
    return wave * programs + turn


@gluon.jit
def block_of(wave, step, shape):
    """This program's block in a wave."""
    number = number_of(wave)
    there = number < step.blocks
    kv_head = number % shape.num_kv_heads
    at = number // shape.num_kv_heads
    sequence = gl.load(step.block_sequence + at, mask=there, other=-1)
    start = gl.load(step.block_start + at, mask=there, other=0)
    there = sequence >= 0
    sequence = gl.maximum(sequence, 0)
    context = gl.load(step.context_len + sequence)
    first_token = gl.load(step.query_start + sequence)
    queries = gl.load(step.query_start + sequence + 1) - first_token
    past = context - queries
    there = there & (context > 0) & (start < queries) & (start % shape.block_q == 0)
    tiles = gl.cdiv(past + gl.minimum(start + shape.block_q, queries), shape.block_n)
    return Block(kv_head, sequence, first_token, queries, start, past, gl.where(there, tiles, 0))


@gluon.jit
def waves(step, shape):
    """How many blocks a program has, some of them perhaps empty."""
    return gl.cdiv(step.blocks, gl.num_programs(0))


@gluon.jit
def softmax(scores, m, scale, first_key, last_key, MASKED: gl.constexpr):
    """Weights of scores, the running maximum after them, and what weights before it shrink by;
    ``scale`` is one number or one of every row."""
    if MASKED:
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        key = first_key + gl.arange(0, scores.shape[1], layout)
        scores = gl.where(key[None, :] <= last_key[:, None], scores, float("-inf"))
    top = gl.maximum(m, gl.max(scores, 1) * scale)
    shrink = gl.exp2(m - top)
    if scale.type.is_block():
        scale = scale[:, None]
    return gl.exp2(scores * scale - top[:, None]), top, shrink


@gluon.jit
def sums_of(weights):
    """``[ROWS, 8]``: sums of every eighth weight, which need nothing of another thread."""
    return gl.sum(weights.reshape([ROWS, weights.shape[1] // 8, 8]), 1)


@gluon.jit
def aligned(x, like):
    """A value of every row, as a factor of ``like``."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def operands_of(half: gl.constexpr, q):
    """What a warpgroup multiplies by keys: the low codes of its queries, and the high ones; where
    keys are no codes only the first of the two counts."""
    CODED: gl.constexpr = q.dtype == gl.float8e4nv
    LOW: gl.constexpr = 2 * half + 1 if CODED else half
    HIGH: gl.constexpr = 2 * half if CODED else half
    return q.index(LOW), q.index(HIGH)


@gluon.jit
def scores_of(q, k, zero):
    """Scores of a warpgroup's queries, on their way."""
    first, second = q
    scores = warpgroup_mma(first, k, zero, use_acc=False, is_async=True)
    if k.dtype == gl.float8e4nv:
        scores = warpgroup_mma(second, k, scores, is_async=True)
    return scores


@gluon.jit
def next_tile(
    i,
    n,
    q,
    keys,
    values,
    weights,
    m,
    total,
    acc,
    zero,
    scale,
    last_key,
    MASKED: gl.constexpr,
    shape,
):
    """Scores of the block's tile ``i``, the program's ``n``, while the values of the one before
    are added."""
    slot = await_tile(keys, n)
    scores = scores_of(q, keys.tiles.index(slot).permute((1, 0)), zero)
    before = await_tile(values, n - 1)
    acc = warpgroup_mma(weights, values.tiles.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(keys.free.index(slot), count=1)
    first_key = i * shape.block_n
    new, m, shrink = softmax(scores, m, scale, first_key, last_key, MASKED)
    total = total * aligned(shrink, total) + sums_of(new)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(values.free.index(before), count=1)
    acc = acc * aligned(shrink, acc)
    weights = gl.convert_layout(new.to(values.tiles.dtype), weights.type.layout)
    return weights, m, total, acc


@gluon.jit
def rows_of(half: gl.constexpr, block, layout: gl.constexpr, shape):
    """Of every row of a warpgroup: its query in the sequence, its head, and whether they are."""
    GROUP: gl.constexpr = shape.num_heads // shape.num_kv_heads
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    query = block.start + row // GROUP
    valid = (query < block.queries) & (row < shape.block_q * GROUP)
    return query, block.kv_head * GROUP + row % GROUP, valid


@gluon.jit
def load_queries(half: gl.constexpr, block, qkv, q, scale, of_rows: gl.constexpr, shape):
    """The rows of a warpgroup into shared memory; what their products with keys are times to be
    scores."""
    HEAD_DIM: gl.constexpr = shape.head_dim
    ACROSS: gl.constexpr = HEAD_DIM // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    query, head, valid = rows_of(half, block, layout, shape)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    at = (block.first_token + query).to(gl.int64) * shape.width + head * HEAD_DIM
    values = gl.load(qkv + at[:, None] + d[None, :], mask=valid[:, None], other=0.0)
    if q.dtype == gl.float8e4nv:
        values = values.to(gl.float32)
        scale = store_codes(values, q.index(2 * half), q.index(2 * half + 1)) * scale
    else:
        q.index(half).store(values.to(q.dtype))
    # In front of the barrier that the stores need before a product reads them.
    fence_async_shared()
    if q.dtype == gl.float8e4nv:
        gl.thread_barrier()
        scale = gl.convert_layout(scale, of_rows)
    return scale


@gluon.jit
def store_output(half: gl.constexpr, block, m, total, acc, sinks, v_scale, output, shape):
    """The rows of a warpgroup, their sums divided."""
    HEAD_DIM: gl.constexpr = shape.head_dim
    layout: gl.constexpr = acc.type.layout
    m = gl.convert_layout(m, gl.SliceLayout(1, layout))
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, layout))
    query, head, valid = rows_of(half, block, layout, shape)
    if sinks is not None:
        sink = gl.load(sinks + head) * LOG2_E
        top = gl.maximum(m, sink)
        shrink = gl.exp2(m - top)
        total = total * shrink + gl.exp2(sink - top)
        acc = acc * shrink[:, None]
    acc = acc * (v_scale / total)[:, None]
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    at = ((block.first_token + query).to(gl.int64) * shape.num_heads + head) * HEAD_DIM
    to = output + at[:, None] + d[None, :]
    gl.store(to, acc.to(output.dtype.element_ty), mask=valid[:, None])


@gluon.jit
def attend(
    half: gl.constexpr, n, block, qkv, q, keys, values, sinks, scale, v_scale, output, shape
):
    """A warpgroup's rows of a block; ``n`` tiles were before it."""
    DEPTH: gl.constexpr = 32 // (q.dtype.primitive_bitwidth // 8)  # of an instruction
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.block_n, DEPTH])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.head_dim, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    scale = load_queries(half, block, qkv, q, scale, of_rows, shape)
    q = operands_of(half, q)
    last_key = block.past + rows_of(half, block, of_scores, shape)[0]
    first = block.past + block.start + half * ROWS // (shape.num_heads // shape.num_kv_heads)
    # Up to here every query of this half sees every key.
    middle = gl.minimum((first + 1) // shape.block_n, block.tiles)
    m = gl.full([ROWS], NO_KEY, gl.float32, of_rows)
    acc = gl.zeros([ROWS, shape.head_dim], gl.float32, of_sums)
    zero = gl.zeros([ROWS, shape.block_n], gl.float32, of_scores)

    slot = await_tile(keys, n)
    scores = scores_of(q, keys.tiles.index(slot).permute((1, 0)), zero)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(keys.free.index(slot), count=1)
    weights, m, _ = softmax(scores, m, scale, 0, last_key, True)
    total = sums_of(weights)
    weights = weights.to(values.tiles.dtype)
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, of_sums, 2))
    for i in range(1, middle):
        weights, m, total, acc = next_tile(
            i, n + i, q, keys, values, weights, m, total, acc, zero, scale, last_key, False, shape
        )
    for i in range(gl.maximum(middle, 1), block.tiles):
        weights, m, total, acc = next_tile(
            i, n + i, q, keys, values, weights, m, total, acc, zero, scale, last_key, True, shape
        )
    slot = await_tile(values, n + block.tiles - 1)
    acc = warpgroup_mma(weights, values.tiles.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(values.free.index(slot), count=1)
    store_output(half, block, m, total, acc, sinks, v_scale, output, shape)


@gluon.jit
def multiply(half: gl.constexpr, step, qkv, q, keys, values, sinks, scale, v_scale, output, shape):
    """What a warpgroup does."""
    n = 0
    for wave in range(waves(step, shape)):
        block = block_of(wave, step, shape)
        if block.tiles > 0:
            attend(half, n, block, qkv, q, keys, values, sinks, scale, v_scale, output, shape)
        n += block.tiles


@gluon.jit
def rows_of_pages(step, block, tile, shape):
    """Where k of the pages of a tile is; NO_ROW where the sequence has none."""
    context = block.past + block.queries
    first_page = tile * (shape.block_n // shape.page)
    rows = ()
    for j in gl.static_range(shape.block_n // shape.page):
        there = (first_page + j) * shape.page < context
        table = step.page_table + block.sequence.to(gl.int64) * step.table_stride
        number = gl.load(table + first_page + j, mask=there, other=0)
        row = (number * (2 * shape.num_kv_heads) + block.kv_head) * shape.page
        rows = rows + (gl.where(there, row, NO_ROW),)  # noqa: RUF005 - no star in a kernel
    return rows


@gluon.jit
def copy_pages(pages, rows, offset, ring, slot, barrier, pred, shape):
    """A tile, page by page and part by part, as the swizzle has it in shared memory."""
    PAGES: gl.constexpr = shape.block_n // shape.page
    COLUMNS: gl.constexpr = pages.block_shape[1]
    PARTS: gl.constexpr = shape.head_dim // COLUMNS
    count: gl.constexpr = ring.tiles.shape[0] * PARTS * PAGES
    parts = ring.tiles._reinterpret(pages.dtype, [count, shape.page, COLUMNS], pages.layout)
    for j in gl.static_range(PAGES):
        for c in gl.static_range(PARTS):
            part = parts.index((slot * PARTS + c) * PAGES + j)
            at = [rows[j] + offset, c * COLUMNS]
            tma.async_copy_global_to_shared(pages, at, barrier, part, pred=pred)


@gluon.jit
def clear_rest(pages, ring, slot, stored, shape):
    """Zeros in place of the values from ``stored`` on: nobody wrote them, and they may be NaN,
    which no weight of zero makes up for."""
    EIGHTS: gl.constexpr = shape.block_n // EIGHT
    COLUMNS: gl.constexpr = pages.block_shape[1]
    PARTS: gl.constexpr = shape.head_dim // COLUMNS
    count: gl.constexpr = ring.tiles.shape[0] * PARTS * EIGHTS
    parts = ring.tiles._reinterpret(pages.dtype, [count, EIGHT, COLUMNS], pages.layout)
    of_part: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    key = gl.arange(0, EIGHT, gl.SliceLayout(1, of_part))
    for eight in range(stored // EIGHT, EIGHTS):
        for c in range(PARTS):
            part = parts.index((slot * PARTS + c) * EIGHTS + eight)
            value = part.load(of_part)
            kept = (eight * EIGHT + key < stored)[:, None]
            part.store(gl.where(kept, value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def copy(step, pages, keys, values, landed, shape):
    """What the copying warp does."""
    TILE: gl.constexpr = shape.block_n * shape.head_dim * 2  # bytes
    PLANE: gl.constexpr = shape.num_kv_heads * shape.page  # rows from k to v
    n = 0
    cleared = 0
    for wave in range(waves(step, shape)):
        block = block_of(wave, step, shape)
        context = block.past + block.queries
        rows = rows_of_pages(step, block, 0, shape)
        for i in range(block.tiles):
            now = rows  # a tile ahead, so that no copy waits for the number of its page
            rows = rows_of_pages(step, block, i + 1, shape)
            slot = await_space(keys, n)
            ready = keys.ready.index(slot)
            mbarrier.expect(ready, TILE)
            copy_pages(pages, now, 0, keys, slot, ready, True, shape)
            slot = await_space(values, n)
            ready = values.ready.index(slot)
            stored = context - i * shape.block_n
            whole = (stored >= shape.block_n) | (stored % shape.page == 0)
            mbarrier.expect(ready, TILE, pred=whole)
            copy_pages(pages, now, PLANE, values, slot, ready, whole, shape)
            if not whole:
                mbarrier.expect(landed, TILE)
                copy_pages(pages, now, PLANE, values, slot, landed, True, shape)
                mbarrier.wait(landed, cleared & 1)
                cleared += 1
                clear_rest(pages, values, slot, stored, shape)
                mbarrier.arrive(ready, count=1)
            n += 1


@gluon.jit
def copy_codes(step, pages, keys, codes, shape):
    """What the copying warp does with pages of float8: codes of values are for the decoder."""
    TILE: gl.constexpr = shape.block_n * shape.head_dim  # bytes
    PLANE: gl.constexpr = shape.num_kv_heads * shape.page  # rows from k to v
    n = 0
    for wave in range(waves(step, shape)):
        block = block_of(wave, step, shape)
        rows = rows_of_pages(step, block, 0, shape)
        for i in range(block.tiles):
            now = rows  # a tile ahead, so that no copy waits for the number of its page
            rows = rows_of_pages(step, block, i + 1, shape)
            slot = await_space(keys, n)
            ready = keys.ready.index(slot)
            mbarrier.expect(ready, TILE)
            copy_pages(pages, now, 0, keys, slot, ready, True, shape)
            slot = await_space(codes, n)
            ready = codes.ready.index(slot)
            mbarrier.expect(ready, TILE)
            copy_pages(pages, now, PLANE, codes, slot, ready, True, shape)
            n += 1


@gluon.jit
def decode_tile(codes, values, stored, shape, PARTLY: gl.constexpr):
    """Values of codes; where only a part was ever ``stored``, zeros behind it: NaN there is what no
    weight of zero makes up for."""
    ROWS_AT_ONCE: gl.constexpr = 32
    ACROSS: gl.constexpr = shape.head_dim // 8
    # Eight values are 16 bytes, of which a row's lie next to each other: no bank is asked twice.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    row = gl.arange(0, ROWS_AT_ONCE, gl.SliceLayout(1, layout))
    for start in gl.static_range(0, shape.block_n, ROWS_AT_ONCE):
        value = codes.slice(start, ROWS_AT_ONCE, dim=0).load(layout).to(values.dtype)
        if PARTLY:
            value = gl.where((start + row < stored)[:, None], value, gl.zeros_like(value))
        values.slice(start, ROWS_AT_ONCE, dim=0).store(value)


@gluon.jit
def decode_codes(step, values, codes, shape):
    """What the warpgroup does that turns codes of values into what the others multiply."""
    n = 0
    for wave in range(waves(step, shape)):
        block = block_of(wave, step, shape)
        context = block.past + block.queries
        for i in range(block.tiles):
            stored = context - i * shape.block_n
            source = await_tile(codes, n)
            slot = await_space(values, n)
            if stored >= shape.block_n:
                decode_tile(
                    codes.tiles.index(source), values.tiles.index(slot), stored, shape, False
                )
            else:
                decode_tile(
                    codes.tiles.index(source), values.tiles.index(slot), stored, shape, True
                )
            fence_async_shared()
            mbarrier.arrive(values.ready.index(slot), count=1)
            mbarrier.arrive(codes.free.index(source), count=1)
            n += 1


@gluon.jit
def first_half(
    step, qkv, pages, q, keys, values, landed, codes, sinks, scale, v_scale, output, shape
):
    """The first warpgroup."""
    multiply(0, step, qkv, q, keys, values, sinks, scale, v_scale, output, shape)


@gluon.jit
def second_half(
    step, qkv, pages, q, keys, values, landed, codes, sinks, scale, v_scale, output, shape
):
    """The second warpgroup."""
    multiply(1, step, qkv, q, keys, values, sinks, scale, v_scale, output, shape)


@gluon.jit
def copier(step, qkv, pages, q, keys, values, landed, codes, sinks, scale, v_scale, output, shape):
    """The warp beside them."""
    copy(step, pages, keys, values, landed, shape)


@gluon.jit
def code_copier(
    step, qkv, pages, q, keys, values, landed, codes, sinks, scale, v_scale, output, shape
):
    """The warp beside them where pages are float8."""
    copy_codes(step, pages, keys, codes, shape)


@gluon.jit
def decoder(step, qkv, pages, q, keys, values, landed, codes, sinks, scale, v_scale, output, shape):
    """The warpgroup beside them where pages are float8."""
    decode_codes(step, values, codes, shape)


@gluon.jit
def new_ring(dtype: gl.constexpr, stages: gl.constexpr, readers: gl.constexpr, shape):
    """A ring whose tiles are all free; so many warpgroups read each."""
    block: gl.constexpr = [shape.block_n, shape.head_dim]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(block, dtype)
    tiles = gl.allocate_shared_memory(dtype, [stages, shape.block_n, shape.head_dim], layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(stages):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=readers)
    return Ring(tiles, ready, free)


@gluon.jit(do_not_specialize=["blocks", "table_stride"])
def hopper_prefill_kernel(
    qkv,
    pages,
    query_start,
    context_len,
    page_table,
    block_sequence,
    block_start,
    sinks,
    output,
    blocks,
    table_stride,
    scale,
    v_scale,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    KV_PARTS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    KEYS: gl.constexpr,
    VALUES: gl.constexpr,
    CODES: gl.constexpr,
):
    """Blocks of BLOCK_Q queries, whose k and v are in the pages, for a group of heads together.

    ``pages`` describes rows of one key or value of a head, of which a copy takes
    PAGE, and of each at most SWIZZLE bytes.
    ``blocks`` counts those of every group.
    Grid: at most ``blocks``, best as many as there are multiprocessors. The blocks with the most
    keys should be the first. Where the step's blocks are smaller, the first of those in
    one of ours does it all. Shared memory has tiles of BLOCK_N keys: KEYS of k, VALUES of v, and,
    where pages are float8, CODES of v as it is in them.
    """
    WIDTH: gl.constexpr = (NUM_HEADS + KV_PARTS * NUM_KV_HEADS) * HEAD_DIM
    shape: gl.constexpr = Shape(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WIDTH, PAGE, BLOCK_Q, BLOCK_N)
    step = Step(
        query_start, context_len, page_table, table_stride, block_sequence, block_start, blocks
    )
    CODED: gl.constexpr = pages.dtype == gl.float8e4nv
    # float16 holds every code, and takes one instruction for two of them.
    dtype: gl.constexpr = gl.float16 if CODED else pages.dtype
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], pages.dtype)
    # Of each warpgroup one tile of queries, or two, of high and of low codes.
    parts: gl.constexpr = 4 if CODED else 2
    q = gl.allocate_shared_memory(pages.dtype, [parts, ROWS, HEAD_DIM], half)
    keys = new_ring(pages.dtype, KEYS, 2, shape)
    values = new_ring(dtype, VALUES, 2, shape)
    # What no partition uses is free for their scratch, and a barrier's memory must never be that.
    if CODED:
        codes = new_ring(pages.dtype, CODES, 1, shape)
        landed = codes.ready
    else:
        codes = keys
        landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(landed, count=1)
    fence_async_shared()
    arguments = (
        step, qkv, pages, q, keys, values, landed, codes, sinks, scale, v_scale, output, shape
    )  # fmt: skip
    if CODED:
        gl.warp_specialize(
            [
                (first_half, arguments),
                (second_half, arguments),
                (decoder, arguments),
                (code_copier, arguments),
            ],
            [4, 4, 1],
            [208, 72, 24],
        )
    else:
        gl.warp_specialize(
            [(first_half, arguments), (second_half, arguments), (copier, arguments)],
            [4, 1],
            [240, 24],
        )
