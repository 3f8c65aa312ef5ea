"""Attention of sequences of one new token for Hopper, in Gluon: ``decode_kernel`` of kernels.py
where there is neither a window nor a soft cap.

A warp copies a head's pages into a ring in shared memory, so that many are on their way at any
time; a warpgroup multiplies them, keys first: scores are ``[PAGE, N]`` and sums ``[HEAD_DIM, N]``,
where N is the group of heads, padded to the 8 columns that the tensor cores take at least. The new
token's key never goes through a page: it is what the sums of the last split begin with.
"""

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

LOG2_E = gl.constexpr(1.4426950408889634)
# A running maximum before the first key: finite, so that a difference of two is never NaN.
NO_KEY = gl.constexpr(-1e30)
FP8_MAX = gl.constexpr(448.0)
_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def page_layout(tile: list[int], pages: torch.Tensor) -> gl.NVMMASharedLayout:
    """Of a page's k or v in shared memory, as the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for(tile, _TYPES[pages.dtype])


@gluon.constexpr_function
def _rows_layout(head_dim: int) -> gl.BlockedLayout:
    """Of rows ``[N, HEAD_DIM]`` over four warps, a thread with 8 neighbours."""
    return gl.BlockedLayout([1, 8], [32 * 8 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _scores_layout(columns: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def turned(heads, valid, weight, cos, sin, eps, HEAD_DIM: gl.constexpr, ROTARY: gl.constexpr):
    """float32 ``[N, HEAD_DIM]``: heads at the pointers ``[N, 1]``, normed and turned."""
    rows: gl.constexpr = _rows_layout(HEAD_DIM)
    VECTOR: gl.constexpr = 8 if ROTARY % 8 == 0 else 1
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows))
    turns = d < 2 * ROTARY
    angle = gl.where(d < ROTARY, d, d - ROTARY)
    partner = gl.where(d < ROTARY, d + ROTARY, d - ROTARY)
    angle = gl.max_contiguous(gl.multiple_of(angle, VECTOR), VECTOR)
    partner = gl.max_contiguous(gl.multiple_of(partner, VECTOR), VECTOR)
    x = gl.load(heads + d[None, :], valid, 0.0).to(gl.float32)
    y = gl.load(heads + partner[None, :], valid & turns[None, :], 0.0).to(gl.float32)
    c = gl.load(cos + angle, turns, 1.0)
    s = gl.load(sin + angle, turns, 0.0)
    if weight is not None:
        scale = gl.rsqrt(gl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = x * scale * gl.load(weight + d).to(gl.float32)[None, :]
        y = y * scale * gl.load(weight + partner, turns, 0.0).to(gl.float32)[None, :]
    return x * c[None, :] + y * gl.where(d < ROTARY, -s, s)[None, :]


@gluon.jit
def page_codes(x, scale, dtype: gl.constexpr):
    """Float32 values as a page of ``dtype`` holds them; ``scale`` is the unit of float8 codes."""
    if dtype == gl.float8e4nv:
        x = gl.minimum(gl.maximum(x / scale, -FP8_MAX), FP8_MAX)
    return x.to(dtype)


@gluon.jit
def joined(m, total, acc, m_next, total_next, acc_next, axis: gl.constexpr):
    """Two softmax sums as one, of heads that are an axis of the sums. The rounding is spelled out:
    a split's sum is joined in registers or read back by another program, and the results must be
    the same bits."""
    top = gl.maximum(m, m_next)
    old = gl.exp2(m - top)
    new = gl.exp2(m_next - top)
    acc = gl.fma(acc, gl.expand_dims(old, axis), acc_next * gl.expand_dims(new, axis))
    return top, gl.fma(total, old, total_next * new), acc


@gluon.jit
def finish(m, total, acc, sinks, v_scale, heads, valid, axis: gl.constexpr):
    """The attention output of sums of every key: a sink only joins the denominator."""
    total = gl.where(valid, total, 1.0)
    if sinks is not None:
        sink = gl.load(sinks + heads, valid, 0.0)
        top = gl.maximum(m, sink * LOG2_E)
        shrink = gl.exp2(m - top)
        total = gl.fma(total, shrink, gl.exp2(gl.fma(sink, LOG2_E, -top)))
        return acc * gl.expand_dims(shrink * v_scale / total, axis)
    return acc * gl.expand_dims(v_scale / total, axis)


@gluon.jit
def copy_pages(
    pages,
    table,
    kv_head,
    first_page,
    count,
    k_ring,
    v_ring,
    ready,
    free,
    NUM_KV_HEADS: gl.constexpr,
):
    """Fills the ring with a head's k and v of ``count`` pages of a sequence, in order."""
    STAGES: gl.constexpr = k_ring.shape[0]
    PAGE: gl.constexpr = k_ring.shape[1]
    BYTES: gl.constexpr = 2 * PAGE * k_ring.shape[2] * (k_ring.dtype.primitive_bitwidth // 8)
    number = gl.load(table + first_page)
    for i in range(count):
        slot = i % STAGES
        row = (number * (2 * NUM_KV_HEADS) + kv_head) * PAGE
        number = gl.load(table + first_page + i + 1, i + 1 < count, 0)
        mbarrier.wait(free.index(slot), (i // STAGES & 1) ^ 1)
        full = ready.index(slot)
        mbarrier.expect(full, BYTES)
        tma.async_copy_global_to_shared(pages, [row, 0], full, k_ring.index(slot))
        v_row = row + NUM_KV_HEADS * PAGE
        tma.async_copy_global_to_shared(pages, [v_row, 0], full, v_ring.index(slot))


@gluon.jit
def decoded(page, to):
    """Puts a page of float8 codes into ``to``, in the type that the tensor cores multiply.

    Triton converts to bfloat16 one by one. Here the bits of four codes move to where bfloat16 has
    them, which is the value times 2 ** -120.
    """
    codes = page.load(_rows_layout(to.shape[1]))
    if to.dtype == gl.bfloat16:
        to.store(
            gl.inline_asm_elementwise(
                """
                {
                .reg .b32 high, low, unit;
                shr.u32 high, $2, 4;
                and.b32 high, high, 0x07070707;
                lop3.b32 high, $2, 0x80808080, high, 0xEA;
                shl.b32 low, $2, 4;
                and.b32 low, low, 0xF0F0F0F0;
                mov.b32 unit, 0x7B807B80;
                prmt.b32 $0, low, high, 0x5140;
                prmt.b32 $1, low, high, 0x7362;
                mul.rn.bf16x2 $0, $0, unit;
                mul.rn.bf16x2 $1, $1, unit;
                }
                """,
                "=&r,=&r,r",
                [codes],
                dtype=gl.bfloat16,
                is_pure=True,
                pack=4,
            )
        )
    else:
        to.store(codes.to(to.dtype))


@gluon.jit
def without_rest(page, end):
    """Zeroes the rows of a page of v that nobody has written: 0 times NaN would be NaN."""
    layout: gl.constexpr = _rows_layout(page.shape[1])
    row = gl.arange(0, page.shape[0], gl.SliceLayout(1, layout))
    x = page.load(layout)
    page.store(gl.where((row < end)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def store_split(partials, statistics, place, m, total, acc, valid):
    """Leaves the sums of a split for ``add_splits``; ``place`` counts splits, a row of each."""
    HEAD_DIM: gl.constexpr = acc.shape[0]
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, acc.type.layout))
    gl.store(statistics + 2 * place, m, valid)
    gl.store(statistics + 2 * place + 1, total, valid)
    at = place.to(gl.int64)[None, :] * HEAD_DIM + d[:, None]
    gl.store(partials + at, acc, valid[None, :])


@gluon.jit
def attend(
    qkv,
    cos,
    sin,
    cells,
    slot_mapping,
    q_norm,
    k_norm,
    sinks,
    output,
    partials,
    statistics,
    arrivals,
    sequence,
    kv_head,
    first_page,
    count,
    split,
    end_split,
    splits,
    split_pages,
    cached,
    scale,
    eps,
    k_scale,
    v_scale,
    k_ring,
    v_ring,
    k_operand,
    v_operand,
    q_shared,
    p_shared,
    ready,
    free,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    ROTARY: gl.constexpr,
    KV_PARTS: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
):
    """The sums of the splits [split, end_split), whose pages come through the ring."""
    STAGES: gl.constexpr = k_ring.shape[0]
    PAGE: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[2]
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    WIDTH: gl.constexpr = (NUM_HEADS + KV_PARTS * NUM_KV_HEADS) * HEAD_DIM
    PLANE: gl.constexpr = NUM_KV_HEADS * PAGE * HEAD_DIM
    N: gl.constexpr = q_shared.shape[0]
    CODED: gl.constexpr = k_ring.dtype == gl.float8e4nv
    rows: gl.constexpr = _rows_layout(HEAD_DIM)
    layout: gl.constexpr = _scores_layout(N)
    by_head: gl.constexpr = gl.SliceLayout(0, layout)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)

    row = qkv + sequence.to(gl.int64) * WIDTH
    h = gl.arange(0, N, gl.SliceLayout(1, rows))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows))
    cos += sequence * ROTARY
    sin += sequence * ROTARY
    starts = row + (kv_head * GROUP + h)[:, None] * HEAD_DIM
    q = turned(starts, (h < GROUP)[:, None], q_norm, cos, sin, eps, HEAD_DIM, ROTARY)
    q = q.to(q_shared.dtype)
    q_shared.store(q)
    fence_async_shared()

    new_score = gl.full([N], NO_KEY, gl.float32, by_head)
    new_value = gl.zeros([HEAD_DIM], gl.float32, by_row)
    new_weight = 0.0
    if KV_PARTS > 0:
        one = gl.arange(0, 1, gl.SliceLayout(1, rows))[:, None]
        start = row + (NUM_HEADS + kv_head + one) * HEAD_DIM
        key = turned(start, one == 0, k_norm, cos, sin, eps, HEAD_DIM, ROTARY)
        key = page_codes(gl.sum(key, 0), k_scale, k_ring.dtype)
        from_row: gl.constexpr = (NUM_HEADS + (KV_PARTS - 1) * NUM_KV_HEADS) * HEAD_DIM
        value = gl.load(row + from_row + kv_head * HEAD_DIM + d).to(gl.float32)
        value = page_codes(value, v_scale, k_ring.dtype)
        if end_split == splits:
            to_slot = gl.load(slot_mapping + sequence)
            if to_slot >= 0:
                to = cells + (to_slot // PAGE).to(gl.int64) * (2 * PLANE) + d
                to += (kv_head * PAGE + to_slot % PAGE) * HEAD_DIM
                gl.store(to, key)
                gl.store(to + PLANE, value)
        new_score = gl.sum(q.to(gl.float32) * key.to(gl.float32)[None, :], 1) * scale
        new_score = gl.convert_layout(new_score, by_head)
        new_value = gl.convert_layout(value.to(gl.float32), by_row)
        new_weight = 1.0

    heads = kv_head * GROUP + gl.arange(0, N, by_head)
    valid = gl.arange(0, N, by_head) < GROUP
    place = (sequence * NUM_HEADS + heads) * MAX_SPLITS
    out_row = gl.arange(0, HEAD_DIM, by_row)
    key_row = gl.arange(0, PAGE, by_row)
    zero = gl.zeros([PAGE, N], gl.float32, layout)
    # Of the split at hand, and of the splits before it where one program has them all.
    last = split + 1 == splits
    m = gl.where(last, new_score, NO_KEY)
    total = zero + gl.where(last & (key_row == 0), new_weight, 0.0)[:, None]
    acc = gl.zeros([HEAD_DIM, N], gl.float32, layout)
    acc += gl.where(last, new_value, 0.0)[:, None]
    all_m = gl.full([N], NO_KEY, gl.float32, by_head)
    all_total = gl.zeros([N], gl.float32, by_head)
    all_acc = gl.zeros([HEAD_DIM, N], gl.float32, layout)
    own = end_split - split
    left = split_pages
    gl.thread_barrier()
    for i in range(count):
        slot = i % STAGES
        behind = cached - (first_page + i) * PAGE  # rows of the page that are keys
        mbarrier.wait(ready.index(slot), i // STAGES & 1)
        k = k_ring.index(slot)
        v = v_ring.index(slot)
        if CODED:
            decoded(k, k_operand)
            fence_async_shared()
            gl.thread_barrier()
            s = warpgroup_mma(
                k_operand, q_shared.permute((1, 0)), zero, use_acc=False, is_async=True
            )
            decoded(v, v_operand)
            if behind < PAGE:
                without_rest(v_operand, behind)
        else:
            s = warpgroup_mma(k, q_shared.permute((1, 0)), zero, use_acc=False, is_async=True)
            if behind < PAGE:
                without_rest(v, behind)
        s = warpgroup_mma_wait(0, [s])
        s = gl.where((key_row < behind)[:, None], s * scale, float("-inf"))
        top = gl.maximum(m, gl.max(s, 0))
        shrink = gl.exp2(m - top)
        p = gl.exp2(s - top[None, :])
        total = total * shrink[None, :] + p
        m = top
        p_shared.store(p.to(p_shared.dtype).permute((1, 0)))
        acc = acc * shrink[None, :]
        fence_async_shared()
        gl.thread_barrier()
        p_operand = p_shared.permute((1, 0))
        if CODED:  # the codes are no longer needed
            mbarrier.arrive(free.index(slot), count=1)
            acc = warpgroup_mma(v_operand.permute((1, 0)), p_operand, acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
        else:
            acc = warpgroup_mma(v.permute((1, 0)), p_operand, acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(free.index(slot), count=1)
        left -= 1
        if (left == 0) & (i + 1 < count):
            sum_of_split = gl.sum(total, 0)
            if own == splits:
                all_m, all_total, all_acc = joined(
                    all_m, all_total, all_acc, m, sum_of_split, acc, 0
                )
            else:
                store_split(partials, statistics, place + split, m, sum_of_split, acc, valid)
            split += 1
            left = split_pages
            last = split + 1 == splits
            m = gl.where(last, new_score, NO_KEY)
            total = zero + gl.where(last & (key_row == 0), new_weight, 0.0)[:, None]
            acc = gl.zeros([HEAD_DIM, N], gl.float32, layout)
            acc += gl.where(last, new_value, 0.0)[:, None]

    sum_of_split = gl.sum(total, 0)
    output += sequence.to(gl.int64) * (NUM_HEADS * HEAD_DIM)
    if own == splits:
        all_m, all_total, all_acc = joined(all_m, all_total, all_acc, m, sum_of_split, acc, 0)
        y = finish(all_m, all_total, all_acc, sinks, v_scale, heads, valid, 0)
        at = heads[None, :] * HEAD_DIM + out_row[:, None]
        gl.store(output + at, y.to(output.dtype.element_ty), valid[None, :])
    else:
        store_split(partials, statistics, place + split, m, sum_of_split, acc, valid)
        arrival = arrivals + sequence * NUM_KV_HEADS + kv_head
        gl.thread_barrier()  # every thread's stores come before the arrival
        if gl.atomic_add(arrival, own, sem="acq_rel") + own == splits:
            add_splits(
                partials,
                statistics,
                sinks,
                output,
                sequence * NUM_HEADS + kv_head * GROUP,
                kv_head * GROUP,
                splits,
                v_scale,
                GROUP,
                HEAD_DIM,
                MAX_SPLITS,
            )
            gl.store(arrival, 0)


@gluon.jit
def add_splits(
    partials,
    statistics,
    sinks,
    output,
    first_row,
    first_head,
    splits,
    v_scale,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
):
    """Joins the sums of a group's splits, from the first on, and stores their output.

    Other programs wrote the sums, so they are read past the first-level cache. Loads of eight
    splits are in flight together.
    """
    ROWS: gl.constexpr = triton.next_power_of_2(GROUP)
    UNROLL: gl.constexpr = 8
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 4], [max(128 // HEAD_DIM, 1), min(HEAD_DIM // 4, 32)], [4, 1], [1, 0]
    )
    by_head: gl.constexpr = gl.SliceLayout(1, layout)
    rows = gl.arange(0, ROWS, by_head)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    grouped = rows < GROUP
    wide = grouped[:, None] & (d < HEAD_DIM)[None, :]
    m = gl.full([ROWS], NO_KEY, gl.float32, by_head)
    total = gl.zeros([ROWS], gl.float32, by_head)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout)
    for base in range(0, splits, UNROLL):
        for j in gl.static_range(UNROLL):
            split = base + j
            here = split < splits
            at = (first_row + rows) * MAX_SPLITS + split
            m_next = gl.load(statistics + 2 * at, grouped & here, NO_KEY, cache_modifier=".cg")
            total_next = gl.load(statistics + 2 * at + 1, grouped & here, 0.0, cache_modifier=".cg")
            acc_at = at.to(gl.int64)[:, None] * HEAD_DIM + d[None, :]
            acc_next = gl.load(partials + acc_at, wide & here, 0.0, cache_modifier=".cg")
            m, total, acc = joined(m, total, acc, m_next, total_next, acc_next, 1)
    y = finish(m, total, acc, sinks, v_scale, first_head + rows, grouped, 1)
    to = (first_head + rows)[:, None] * HEAD_DIM + d[None, :]
    gl.store(output + to, y.to(output.dtype.element_ty), wide)


@gluon.jit
def pages_of_step(context_len, PAGE: gl.constexpr):
    """The pages of all sequences together."""
    CHUNK: gl.constexpr = 1024
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    index = gl.arange(0, CHUNK, layout)
    pages = gl.zeros([CHUNK], gl.int32, layout)
    for start in range(0, gl.num_programs(1), CHUNK):
        here = start + index < gl.num_programs(1)
        pages += gl.cdiv(gl.load(context_len + start + index, here, 0), PAGE)
    return gl.sum(pages, 0)


@gluon.jit(do_not_specialize=["table_stride", "slots"])
def hopper_decode_kernel(
    qkv,
    cos,
    sin,
    pages,
    cells,
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
    N: gl.constexpr,
    STAGES: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
    PDL: gl.constexpr,
):
    """One new token of each sequence. Grid: (NUM_KV_HEADS, sequences, programs a head).

    ``pages`` is a descriptor of ``cells``, the layer's pages, as rows of HEAD_DIM in tiles of PAGE.
    The keys of a sequence are cut into at most MAX_SPLITS splits of whole pages, whose size follows
    from its context alone; how many programs share them changes no bit of the result: as many as
    give each an even share of the step, of which ``slots`` programs run at a time. The last program
    to arrive adds up all.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = gl.program_id(0)
    sequence = gl.program_id(1)
    part = gl.program_id(2)
    context = gl.load(context_len + sequence)
    if context <= 0:
        return
    cached = context
    if KV_PARTS > 0:
        cached = context - 1
    # A first token's page has no keys, and is read all the same.
    num_pages = gl.maximum(gl.cdiv(cached, PAGE), 1)
    split_pages = gl.cdiv(num_pages, MAX_SPLITS)
    splits = gl.cdiv(num_pages, split_pages)
    even = gl.cdiv(pages_of_step(context_len, PAGE) * NUM_KV_HEADS, slots)
    share = gl.maximum(gl.cdiv(splits, gl.num_programs(2)), gl.cdiv(even, split_pages))
    split = part * share
    if split >= splits:
        return
    end_split = gl.minimum(split + share, splits)
    first_page = split * split_pages
    count = gl.minimum(end_split * split_pages, num_pages) - first_page

    dtype: gl.constexpr = pages.dtype
    CODED: gl.constexpr = dtype == gl.float8e4nv
    operand: gl.constexpr = qkv.dtype.element_ty if CODED else dtype
    # Weights of the softmax and values of fp8 pages are exact enough, or exact, in float16.
    weight: gl.constexpr = gl.float16 if CODED else dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, HEAD_DIM], operand)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, PAGE, HEAD_DIM], pages.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, PAGE, HEAD_DIM], pages.layout)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, HEAD_DIM], operand)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, PAGE], weight)
    q_shared = gl.allocate_shared_memory(operand, [N, HEAD_DIM], q_layout)
    p_shared = gl.allocate_shared_memory(weight, [N, PAGE], p_layout)
    k_operand = q_shared
    v_operand = q_shared
    if CODED:
        k_operand = gl.allocate_shared_memory(operand, [PAGE, HEAD_DIM], tile)
        v_operand = gl.allocate_shared_memory(weight, [PAGE, HEAD_DIM], tile)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(STAGES):
        mbarrier.init(ready.index(j), count=1)
        mbarrier.init(free.index(j), count=1)
    table = page_table + sequence.to(gl.int64) * table_stride
    gl.warp_specialize(
        [
            (
                attend,
                (
                    qkv,
                    cos,
                    sin,
                    cells,
                    slot_mapping,
                    q_norm,
                    k_norm,
                    sinks,
                    output,
                    partials,
                    statistics,
                    arrivals,
                    sequence,
                    kv_head,
                    first_page,
                    count,
                    split,
                    end_split,
                    splits,
                    split_pages,
                    cached,
                    scale,
                    eps,
                    k_scale,
                    v_scale,
                    k_ring,
                    v_ring,
                    k_operand,
                    v_operand,
                    q_shared,
                    p_shared,
                    ready,
                    free,
                    NUM_HEADS,
                    NUM_KV_HEADS,
                    ROTARY,
                    KV_PARTS,
                    MAX_SPLITS,
                ),
            ),
            (
                copy_pages,
                (
                    pages,
                    table,
                    kv_head,
                    first_page,
                    count,
                    k_ring,
                    v_ring,
                    ready,
                    free,
                    NUM_KV_HEADS,
                ),
            ),
        ],
        [1],
        [24],
    )
