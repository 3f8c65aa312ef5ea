"""Attention of sequences of one new token, or a few, over a paged KV cache for Hopper, in Gluon.

It is what ``decode_kernel`` is elsewhere. One warp copies a head's pages into a ring in shared
memory by TMA, so that many are on their way at any time, and a warpgroup multiplies them with the
queries of a group of heads: keys first, since the tensor cores take as few as 8 columns. Keys of
float8 are multiplied as they are, by queries in two codes (``hopper_codes``), while values are
decoded. The key of a single new token comes through no page: its score and value are what the sums
of the last split begin with. Of several, ``write_kernel`` has stored the keys and turned the
queries before. Scores are kept in units of log 2, so that ``exp2`` is the softmax's exponential.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.plugins.cuda.kernels import prefetch
from slipstream.plugins.paged_attention.cuda.hopper_codes import store_codes
from slipstream.plugins.paged_attention.cuda.hopper_plan import PARTS

LOG2_E = gl.constexpr(1.4426950408889634)
# A running maximum before the first key: finite, so that a difference of two is never NaN.
NO_KEY = gl.constexpr(-1e30)
FP8_MAX = gl.constexpr(448.0)
_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def page_layout(page: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a page's keys or values ``[PAGE, HEAD_DIM]`` lie in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(page, _TYPES[dtype])


class Shape(NamedTuple):
    """What the kernel is compiled for; ``columns`` are the heads of a group for each of up to
    ``queries`` tokens, padded. Such of one token ``joins`` the keys that it has in qkv itself.
    ``waits``: for the kernel in front, before it reads qkv. ``at_once``: what is launched behind
    it begins, otherwise when its last pages are on their way."""

    num_heads: gl.constexpr
    num_kv_heads: gl.constexpr
    head_dim: gl.constexpr
    rotary: gl.constexpr
    page: gl.constexpr
    kv_parts: gl.constexpr
    joins: gl.constexpr
    queries: gl.constexpr
    columns: gl.constexpr
    stages: gl.constexpr
    max_splits: gl.constexpr
    waits: gl.constexpr
    at_once: gl.constexpr


class Token(NamedTuple):
    """Where the new tokens are and go; ``cells`` are the layer's pages."""

    qkv: gl.tensor
    cos: gl.tensor
    sin: gl.tensor
    q_norm: gl.tensor
    k_norm: gl.tensor
    eps: gl.tensor
    cells: gl.tensor
    slot_mapping: gl.tensor
    k_scale: gl.tensor
    v_scale: gl.tensor


class Output(NamedTuple):
    """Where results go, and what programs hand to each other."""

    output: gl.tensor
    sinks: gl.tensor
    v_scale: gl.tensor
    partials: gl.tensor
    statistics: gl.tensor
    arrivals: gl.tensor


class Work(NamedTuple):
    """A program's splits [split, end_split) of a sequence's ``splits``, ``cached`` keys in pages;
    in pages, ``count`` from ``first_page`` on. Its ``queries`` begin with ``token``."""

    kv_head: gl.tensor
    sequence: gl.tensor
    token: gl.tensor
    queries: gl.tensor
    cached: gl.tensor
    split_pages: gl.tensor
    splits: gl.tensor
    split: gl.tensor
    end_split: gl.tensor
    first_page: gl.tensor
    count: gl.tensor


class Ring(NamedTuple):
    """Pages in shared memory; a phase of ``ready`` ends when k and v of one have come, one of
    ``free`` when they have been read."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Operands(NamedTuple):
    """What the tensor cores read beside the ring: queries, or their high and low codes, weights of
    the softmax, and values of float8 codes as the numbers that they are."""

    q: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor


class Sums(NamedTuple):
    """Of keys for a group of heads: their largest score and the sum of their weights, by head, and
    of their values ``[HEAD_DIM, columns]``."""

    m: gl.tensor
    total: gl.tensor
    acc: gl.tensor


@gluon.constexpr_function
def rows_layout(width: int) -> gl.BlockedLayout:
    """Of rows of ``width`` elements over four warps, eight neighbours a thread."""
    return gl.BlockedLayout([1, 8], [32 * 8 // width, width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def sums_layout(columns: int) -> gl.NVMMADistributedLayout:
    """Of scores ``[PAGE, columns]``, and of sums ``[HEAD_DIM, columns]``."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def turned(heads, valid, weight, cos, sin, eps, shape):
    """float32 ``[N, HEAD_DIM]``: heads at the pointers ``[N, 1]``, normed and turned.

    Dimension i < rotary turns with i + rotary. Both are loaded, which is cheaper than moving them
    between threads.
    """
    VECTOR: gl.constexpr = 8 if shape.rotary % 8 == 0 else 1
    d = gl.arange(0, shape.head_dim, gl.SliceLayout(0, rows_layout(shape.head_dim)))
    turns = d < 2 * shape.rotary
    angle = gl.where(d < shape.rotary, d, d - shape.rotary)
    partner = gl.where(d < shape.rotary, d + shape.rotary, d - shape.rotary)
    angle = gl.max_contiguous(gl.multiple_of(angle, VECTOR), VECTOR)
    partner = gl.max_contiguous(gl.multiple_of(partner, VECTOR), VECTOR)
    x = gl.load(heads + d[None, :], valid, 0.0).to(gl.float32)
    y = gl.load(heads + partner[None, :], valid & turns[None, :], 0.0).to(gl.float32)
    c = gl.load(cos + angle, turns, 1.0)
    s = gl.load(sin + angle, turns, 0.0)
    if weight is not None:
        scale = gl.rsqrt(gl.sum(x * x, 1) / shape.head_dim + eps)[:, None]
        x = x * scale * gl.load(weight + d).to(gl.float32)[None, :]
        y = y * scale * gl.load(weight + partner, turns, 0.0).to(gl.float32)[None, :]
    return x * c[None, :] + y * gl.where(d < shape.rotary, -s, s)[None, :]


@gluon.jit
def page_codes(x, scale, dtype: gl.constexpr):
    """Float32 values as a page of ``dtype`` holds them; ``scale`` is the unit of float8 codes."""
    if dtype == gl.float8e4nv:
        x = gl.minimum(gl.maximum(x / scale, -FP8_MAX), FP8_MAX)
    return x.to(dtype)


@gluon.jit
def new_key_value(row, token, work, dtype: gl.constexpr, shape):
    """The codes ``[HEAD_DIM]`` of the new token's k and v, whose qkv begins at ``row``; they go to
    their page too, where this program has the last split."""
    rows: gl.constexpr = rows_layout(shape.head_dim)
    PLANE: gl.constexpr = shape.num_kv_heads * shape.page * shape.head_dim
    one = gl.arange(0, 1, gl.SliceLayout(1, rows))[:, None]
    d = gl.arange(0, shape.head_dim, gl.SliceLayout(0, rows))
    head = row + (shape.num_heads + work.kv_head) * shape.head_dim
    cos = token.cos + work.sequence * shape.rotary
    sin = token.sin + work.sequence * shape.rotary
    at = head + one * shape.head_dim
    key = gl.sum(turned(at, one == 0, token.k_norm, cos, sin, token.eps, shape), 0)
    key = page_codes(key, token.k_scale, dtype)
    from_k: gl.constexpr = (shape.kv_parts - 1) * shape.num_kv_heads * shape.head_dim
    value = page_codes(gl.load(head + from_k + d).to(gl.float32), token.v_scale, dtype)
    if work.end_split == work.splits:
        slot = gl.load(token.slot_mapping + work.sequence)
        if slot >= 0:
            cell = work.kv_head * shape.page + slot % shape.page
            to = token.cells + (slot // shape.page).to(gl.int64) * (2 * PLANE)
            gl.store(to + cell * shape.head_dim + d, key)
            gl.store(to + PLANE + cell * shape.head_dim + d, value)
    return key, value


@gluon.jit
def query_of(column, shape):
    """Which query of a sequence a column is of."""
    GROUP: gl.constexpr = shape.num_heads // shape.num_kv_heads
    if shape.queries == 1:
        return column * 0
    return column // GROUP


@gluon.jit
def head_of(column, work, shape):
    """The head of a column, its place in what has one for every token and head, and whether there
    is one."""
    GROUP: gl.constexpr = shape.num_heads // shape.num_kv_heads
    if shape.queries == 1:
        head = work.kv_head * GROUP + column
        return head, work.sequence * shape.num_heads + head, column < GROUP
    head = work.kv_head * GROUP + column % GROUP
    place = (work.token + column // GROUP) * shape.num_heads + head
    return head, place, column // GROUP < work.queries


@gluon.jit
def prepared(token, work, scale, operands, dtype: gl.constexpr, shape):
    """Stores q for the tensor cores, and returns the sums of the new key alone, or of none, and
    what products with other keys are times to be scores."""
    WIDTH: gl.constexpr = (shape.num_heads + shape.kv_parts * shape.num_kv_heads) * shape.head_dim
    rows: gl.constexpr = rows_layout(shape.head_dim)
    layout: gl.constexpr = sums_layout(shape.columns)
    row = token.qkv + work.sequence.to(gl.int64) * WIDTH
    column = gl.arange(0, shape.columns, gl.SliceLayout(1, rows))
    head, _, valid = head_of(column, work, shape)
    if shape.queries > 1:
        d = gl.arange(0, shape.head_dim, gl.SliceLayout(0, rows))
        at = (work.token + query_of(column, shape)).to(gl.int64) * WIDTH + head * shape.head_dim
        q = gl.load(token.qkv + at[:, None] + d[None, :], valid[:, None], 0.0)
    else:
        at = row + head[:, None] * shape.head_dim
        cos = token.cos + work.sequence * shape.rotary
        sin = token.sin + work.sequence * shape.rotary
        q = turned(at, valid[:, None], token.q_norm, cos, sin, token.eps, shape)
    q = q.to(token.qkv.dtype.element_ty)
    factor = scale
    if dtype == gl.float8e4nv:
        unit = store_codes(q.to(gl.float32), operands.q.index(0), operands.q.index(1))
        factor = gl.convert_layout(unit, gl.SliceLayout(0, layout))[None, :] * scale
    else:
        operands.q.index(0).store(q)
    fence_async_shared()
    gl.thread_barrier()
    m, total, acc = no_sums(shape)
    if shape.joins:
        key, value = new_key_value(row, token, work, dtype, shape)
        score = gl.sum(q.to(gl.float32) * key.to(gl.float32)[None, :], 1) * scale
        m = gl.convert_layout(score, gl.SliceLayout(0, layout))
        total += 1.0
        acc += gl.convert_layout(value.to(gl.float32), gl.SliceLayout(1, layout))[:, None]
    return Sums(m, total, acc), factor


@gluon.jit
def scores_of(k, q, zero):
    """Scores of a page's keys, on their way: of codes, by the low codes of queries and the high."""
    if k.dtype == gl.float8e4nv:
        scores = warpgroup_mma(k, q.index(1).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(k, q.index(0).permute((1, 0)), scores, is_async=True)
    else:
        scores = warpgroup_mma(k, q.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    return scores


@gluon.jit
def no_sums(shape):
    """Sums of no key."""
    layout: gl.constexpr = sums_layout(shape.columns)
    m = gl.full([shape.columns], NO_KEY, gl.float32, gl.SliceLayout(0, layout))
    acc = gl.zeros([shape.head_dim, shape.columns], gl.float32, layout)
    return Sums(m, gl.zeros_like(m), acc)


@gluon.jit
def joined(one, other, axis: gl.constexpr):
    """Two sums as one, of heads that are an axis of the values. The rounding is spelled out: a
    split's sums are joined in registers or read back by another program, and the results must be
    the same bits."""
    top = gl.maximum(one.m, other.m)
    old = gl.exp2(one.m - top)
    new = gl.exp2(other.m - top)
    acc = gl.fma(one.acc, gl.expand_dims(old, axis), other.acc * gl.expand_dims(new, axis))
    return Sums(top, gl.fma(one.total, old, other.total * new), acc)


@gluon.jit
def finished(sums, sinks, v_scale, heads, valid, axis: gl.constexpr):
    """The attention output of sums of every key: a sink only joins the denominator."""
    total = gl.where(valid, sums.total, 1.0)
    if sinks is not None:
        sink = gl.load(sinks + heads, valid, 0.0)
        top = gl.maximum(sums.m, sink * LOG2_E)
        shrink = gl.exp2(sums.m - top)
        total = gl.fma(total, shrink, gl.exp2(gl.fma(sink, LOG2_E, -top)))
        return sums.acc * gl.expand_dims(shrink * v_scale / total, axis)
    return sums.acc * gl.expand_dims(v_scale / total, axis)


@gluon.jit
def store_split(to, split, sums, work, shape):
    """Leaves the sums of a split for ``add_splits``."""
    layout: gl.constexpr = sums.acc.type.layout
    column = gl.arange(0, shape.columns, gl.SliceLayout(0, layout))
    d = gl.arange(0, shape.head_dim, gl.SliceLayout(1, layout))
    _, row, valid = head_of(column, work, shape)
    place = row * shape.max_splits + split
    gl.store(to.statistics + 2 * place, sums.m, valid)
    gl.store(to.statistics + 2 * place + 1, sums.total, valid)
    at = place.to(gl.int64)[None, :] * shape.head_dim + d[:, None]
    gl.store(to.partials + at, sums.acc, valid[None, :])


@gluon.jit
def add_splits(to, work, shape):
    """Joins the sums of a group's splits, from the first on, and stores their output.

    Other programs wrote the sums, so they are read past the first-level cache. Loads of eight
    splits are in flight together.
    """
    GROUP: gl.constexpr = shape.num_heads // shape.num_kv_heads
    ROWS: gl.constexpr = triton.next_power_of_2(GROUP * shape.queries)
    UNROLL: gl.constexpr = 8
    ACROSS: gl.constexpr = min(shape.head_dim // 4, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    column = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, shape.head_dim, gl.SliceLayout(0, layout))
    m = gl.full([ROWS], NO_KEY, gl.float32, gl.SliceLayout(1, layout))
    acc = gl.zeros([ROWS, shape.head_dim], gl.float32, layout)
    sums = Sums(m, gl.zeros_like(m), acc)
    head, row, valid = head_of(column, work, shape)
    for base in range(0, work.splits, UNROLL):
        for j in gl.static_range(UNROLL):
            here = valid & (base + j < work.splits)
            place = row * shape.max_splits + base + j
            m = gl.load(to.statistics + 2 * place, here, NO_KEY, cache_modifier=".cg")
            total = gl.load(to.statistics + 2 * place + 1, here, 0.0, cache_modifier=".cg")
            at = place.to(gl.int64)[:, None] * shape.head_dim + d[None, :]
            acc = gl.load(to.partials + at, here[:, None], 0.0, cache_modifier=".cg")
            sums = joined(sums, Sums(m, total, acc), 1)
    y = finished(sums, to.sinks, to.v_scale, head, valid, 1)
    at = row.to(gl.int64)[:, None] * shape.head_dim + d[None, :]
    gl.store(to.output + at, y.to(to.output.dtype.element_ty), valid[:, None])


@gluon.jit
def store_output(to, sums, work, shape):
    """The output of a program that has every key."""
    layout: gl.constexpr = sums.acc.type.layout
    column = gl.arange(0, shape.columns, gl.SliceLayout(0, layout))
    d = gl.arange(0, shape.head_dim, gl.SliceLayout(1, layout))
    head, row, valid = head_of(column, work, shape)
    y = finished(sums, to.sinks, to.v_scale, head, valid, 0)
    at = row.to(gl.int64)[None, :] * shape.head_dim + d[:, None]
    gl.store(to.output + at, y.to(to.output.dtype.element_ty), valid[None, :])


@gluon.jit
def decode_codes(page, to):
    """Puts a page of float8 codes into ``to``, in the type that the tensor cores multiply."""
    x = page.load(rows_layout(to.shape[1]))
    to.store(x.to(to.dtype))


@gluon.jit
def clear_rest(page, stored):
    """Zeros in place of the values from ``stored`` on: nobody wrote them, and they may be NaN,
    which no weight of zero makes up for."""
    layout: gl.constexpr = rows_layout(page.shape[1])
    key = gl.arange(0, page.shape[0], gl.SliceLayout(1, layout))
    x = page.load(layout)
    page.store(gl.where((key < stored)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def copy(pages, table, work, ring, shape):
    """What the copying warp does: the pages of the program's splits, in order."""
    BYTES: gl.constexpr = ring.k.dtype.primitive_bitwidth // 8
    PAGE_BYTES: gl.constexpr = 2 * shape.page * shape.head_dim * BYTES
    table += work.first_page
    number = gl.load(table)
    for i in range(work.count):
        slot = i % shape.stages
        row = (number * (2 * shape.num_kv_heads) + work.kv_head) * shape.page
        number = gl.load(table + i + 1, i + 1 < work.count, 0)
        mbarrier.wait(ring.free.index(slot), (i // shape.stages & 1) ^ 1)
        ready = ring.ready.index(slot)
        mbarrier.expect(ready, PAGE_BYTES)
        tma.async_copy_global_to_shared(pages, [row, 0], ready, ring.k.index(slot))
        v_row = row + shape.num_kv_heads * shape.page
        tma.async_copy_global_to_shared(pages, [v_row, 0], ready, ring.v.index(slot))


@gluon.jit
def touch(pointer, COUNT: gl.constexpr):
    """Has the cache read COUNT numbers."""
    index = gl.arange(0, triton.next_power_of_2(COUNT), gl.BlockedLayout([1], [32], [4], [0]))
    prefetch(pointer + gl.minimum(index, COUNT - 1))


@gluon.jit
def attend(token, to, work, scale, ring, operands, shape):
    """What the warpgroup does: sums of the program's splits, and the output if it is the last."""
    CODED: gl.constexpr = ring.k.dtype == gl.float8e4nv
    layout: gl.constexpr = sums_layout(shape.columns)
    key_row = gl.arange(0, shape.page, gl.SliceLayout(1, layout))
    column = gl.arange(0, shape.columns, gl.SliceLayout(0, layout))
    fewer = work.queries - 1 - query_of(column, shape)  # keys than the last query sees
    DEPTH: gl.constexpr = 32 if CODED else 16
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.columns, DEPTH])
    zero = gl.zeros([shape.page, shape.columns], gl.float32, of_scores)
    if shape.waits:
        if token.q_norm is not None:
            touch(token.q_norm, shape.head_dim)
            touch(token.k_norm, shape.head_dim)
        if to.sinks is not None:
            touch(to.sinks, shape.num_heads)
        gdc_wait()
        if shape.at_once:
            gdc_launch_dependents()
    new, scale = prepared(token, work, scale, operands, ring.k.dtype, shape)
    # Sums of the split at hand, the weights' by row, which need nothing of another thread; and of
    # the splits before it where this program has them all.
    m, weights, acc = begun(new, work.split + 1 == work.splits, shape)
    every = no_sums(shape)
    split = work.split
    own = work.end_split - split
    left = work.split_pages
    begins = -1  # what is behind has begun
    if not shape.at_once:
        begins = gl.maximum(work.count - shape.stages, 0)  # then the last page is on its way
    for i in range(work.count):
        if i == begins:
            gdc_launch_dependents()
        slot = i % shape.stages
        stored = work.cached - (work.first_page + i) * shape.page
        mbarrier.wait(ring.ready.index(slot), i // shape.stages & 1)
        k = ring.k.index(slot)
        v = ring.v.index(slot)
        scores = scores_of(k, operands.q, zero)
        if CODED:
            decode_codes(v, operands.v)
            v = operands.v
        if stored < shape.page:
            clear_rest(v, stored)
        scores = warpgroup_mma_wait(0, [scores])
        scores = gl.convert_layout(scores, layout) * scale
        if shape.queries > 1:
            visible = key_row[:, None] < (stored - fewer)[None, :]
            scores = gl.where(visible, scores, float("-inf"))
        else:
            scores = gl.where((key_row < stored)[:, None], scores, float("-inf"))
        top = gl.maximum(m, gl.max(scores, 0))
        shrink = gl.exp2(m - top)
        p = gl.exp2(scores - top[None, :])
        weights = weights * shrink[None, :] + p
        acc = acc * shrink[None, :]
        m = top
        operands.p.store(p.to(operands.p.dtype).permute((1, 0)))
        fence_async_shared()
        gl.thread_barrier()
        if CODED:
            mbarrier.arrive(ring.free.index(slot), count=1)
        p = operands.p.permute((1, 0))
        acc = warpgroup_mma(v.permute((1, 0)), p, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        if not CODED:
            mbarrier.arrive(ring.free.index(slot), count=1)
        left -= 1
        if (left == 0) & (i + 1 < work.count):
            sums = Sums(m, gl.sum(weights, 0), acc)
            if own == work.splits:
                every = joined(every, sums, 0)
            else:
                store_split(to, split, sums, work, shape)
            split += 1
            left = work.split_pages
            m, weights, acc = begun(new, split + 1 == work.splits, shape)

    sums = Sums(m, gl.sum(weights, 0), acc)
    if own == work.splits:
        store_output(to, joined(every, sums, 0), work, shape)
    else:
        store_split(to, split, sums, work, shape)
        arrival = to.arrivals + work.sequence * shape.num_kv_heads + work.kv_head
        gl.thread_barrier()  # every thread's stores come before the arrival
        if gl.atomic_add(arrival, own, sem="acq_rel") + own == work.splits:
            add_splits(to, work, shape)
            gl.store(arrival, 0)


@gluon.jit
def begun(new, last, shape):
    """What a split's sums begin with: the new key, if it is the last one. Its weight is in the
    first row of ``[PAGE, columns]``."""
    none = no_sums(shape)
    row = gl.arange(0, shape.page, gl.SliceLayout(1, new.acc.type.layout))
    total = gl.where(last, new.total, 0.0)
    weights = gl.where((row == 0)[:, None], total[None, :], 0.0)
    return gl.where(last, new.m, none.m), weights, gl.where(last, new.acc, none.acc)


@gluon.jit
def multiplier(pages, table, token, to, work, scale, ring, operands, shape):
    """The warpgroup."""
    attend(token, to, work, scale, ring, operands, shape)


@gluon.jit
def copier(pages, table, token, to, work, scale, ring, operands, shape):
    """The warp beside it."""
    copy(pages, table, work, ring, shape)


@gluon.jit
def work_of(plan, query_start, context_len, slots, shape):
    """This program's part of the step; none if its ``count`` is 0. A single sequence has no plan,
    and a program for each of its parts."""
    sequence, part = gl.program_id(1) * 0, gl.program_id(1)
    if plan is not None:
        entry = gl.load(plan + 1 + gl.program_id(1))
        sequence, part = gl.maximum(entry, 0) // PARTS, entry % PARTS
    context = gl.load(context_len + sequence)
    cached = context
    if shape.joins:
        cached = context - 1
    # The page of a first token has no keys, and is read all the same.
    num_pages = gl.maximum(gl.cdiv(cached, shape.page), 1)
    split_pages = gl.cdiv(num_pages, shape.max_splits)
    splits = gl.cdiv(num_pages, split_pages)
    even = gl.cdiv(num_pages * shape.num_kv_heads, slots)
    if plan is not None:
        even = gl.load(plan)
    share = gl.cdiv(even, split_pages)
    split = part * share
    end_split = gl.minimum(split + share, splits)
    first = split * split_pages
    count = gl.minimum(end_split * split_pages, num_pages) - first
    count = gl.where(context > 0, count, 0)
    if plan is not None:
        count = gl.where(entry >= 0, count, 0)
    token, queries = sequence, sequence * 0 + 1
    if shape.queries > 1:
        token = gl.load(query_start + sequence)
        queries = gl.load(query_start + sequence + 1) - token
    place = (gl.program_id(0), sequence, token, queries)
    return Work(*place, cached, split_pages, splits, split, end_split, first, count)


@gluon.jit
def end_idle(WAITS: gl.constexpr):
    """The end of a program without work: no grid may end before the one in front of it has, or
    what comes behind would not know that both have."""
    if WAITS:
        gdc_wait()


@gluon.jit
def new_ring(dtype: gl.constexpr, shape):
    """A ring whose places are all free."""
    page: gl.constexpr = [shape.page, shape.head_dim]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(page, dtype)
    pages: gl.constexpr = [shape.stages, shape.page, shape.head_dim]
    k = gl.allocate_shared_memory(dtype, pages, layout)
    v = gl.allocate_shared_memory(dtype, pages, layout)
    ready = gl.allocate_shared_memory(gl.int64, [shape.stages, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [shape.stages, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(shape.stages):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    return Ring(k, v, ready, free)


@gluon.jit
def new_operands(dtype: gl.constexpr, shape):
    """Room for operands beside pages of ``dtype``. Weights of the softmax are fine enough in
    float16, and codes exact."""
    CODED: gl.constexpr = dtype == gl.float8e4nv
    weight: gl.constexpr = gl.float16 if CODED else dtype
    parts: gl.constexpr = 2 if CODED else 1
    rows: gl.constexpr = [shape.columns, shape.head_dim]
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for(rows, dtype)
    weights: gl.constexpr = [shape.columns, shape.page]
    of_weights: gl.constexpr = gl.NVMMASharedLayout.get_default_for(weights, weight)
    q = gl.allocate_shared_memory(dtype, [parts, shape.columns, shape.head_dim], of_rows)
    p = gl.allocate_shared_memory(weight, weights, of_weights)
    v = p
    if CODED:
        page: gl.constexpr = [shape.page, shape.head_dim]
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(page, weight)
        v = gl.allocate_shared_memory(weight, page, layout)
    return Operands(q, p, v)


@gluon.jit(do_not_specialize=["table_stride", "slots"])
def hopper_decode_kernel(
    qkv,
    cos,
    sin,
    pages,
    cells,
    query_start,
    context_len,
    page_table,
    slot_mapping,
    q_norm,
    k_norm,
    sinks,
    output,
    partials,
    statistics,
    arrivals,
    plan,
    table_stride,
    slots,
    scale,
    eps,
    k_scale,
    v_scale,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    ROTARY: gl.constexpr,
    PAGE: gl.constexpr,
    KV_PARTS: gl.constexpr,
    QUERIES: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
    PDL: gl.constexpr,
    EARLY: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    """One new token of each sequence, or up to QUERIES, whose k and v are in the pages and whose q
    is turned. Grid: (NUM_KV_HEADS, programs of a head).

    ``pages`` describes ``cells``, the layer's pages, as rows of HEAD_DIM. The keys of a sequence
    are cut into at most MAX_SPLITS splits of whole pages, whose size follows from its context
    alone. How many programs share them changes no bit of the result: so many, by ``plan`` (see
    ``plan_kernel``; None of a single sequence), that each has an even share of the step, of
    which ``slots`` run at a time. The last one to arrive adds up all. EARLY:
    only what made qkv may still be running, so that pages come meanwhile. AT_ONCE: what is launched
    behind this kernel reads its weights while this one, which reads little, is at work.
    """
    WAITS: gl.constexpr = PDL and EARLY
    if PDL and not EARLY:
        if AT_ONCE:
            gdc_launch_dependents()
        gdc_wait()
    JOINS: gl.constexpr = KV_PARTS > 0 and QUERIES == 1
    shape: gl.constexpr = Shape(
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        ROTARY,
        PAGE,
        KV_PARTS,
        JOINS,
        QUERIES,
        COLUMNS,
        STAGES,
        MAX_SPLITS,
        WAITS,
        AT_ONCE,
    )
    work = work_of(plan, query_start, context_len, slots, shape)
    if work.count <= 0:
        end_idle(WAITS)
        return
    table = page_table + work.sequence.to(gl.int64) * table_stride
    token = Token(qkv, cos, sin, q_norm, k_norm, eps, cells, slot_mapping, k_scale, v_scale)
    to = Output(output, sinks, v_scale, partials, statistics, arrivals)
    ring = new_ring(pages.dtype, shape)
    operands = new_operands(pages.dtype, shape)
    state = (pages, table, token, to, work, scale, ring, operands, shape)
    gl.warp_specialize([(multiplier, state), (copier, state)], [1], [24])
