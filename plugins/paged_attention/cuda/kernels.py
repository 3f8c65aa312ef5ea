"""Attention over a paged KV cache in Triton.

``decode_kernel`` is the whole operator for sequences of one new token, and the second of two
phases, after ``write_kernel``, for those of a few; ``write_kernel`` and ``prefill_kernel`` are the
two for the others. In a page and head k and v are both ``[PAGE, HEAD_DIM]``. Scores are kept in
units of log 2, so that ``exp2`` is the softmax's exponential. A head's columns are padded to
``BLOCK_D``, a power of two. ``KV_PARTS`` is what qkv has beside q: 2 k and v, 1 k, which is v too,
0 none, as a kernel before this one has stored them.
"""

import triton
import triton.language as tl

from slipstream.plugins.cuda.kernels import begin

LOG2_E = tl.constexpr(1.4426950408889634)
# A running maximum before the first key: finite, so that a difference of two is never NaN.
NO_KEY = tl.constexpr(-1e30)
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def turned_heads(heads, valid, weight, cos, sin, eps, HEAD_DIM, ROTARY, BLOCK_D: tl.constexpr):
    """float32 ``[N, BLOCK_D]``: heads at the pointers ``[N, 1]``, normed and turned.

    Dimension i < ROTARY turns with i + ROTARY. Both are loaded, which is cheaper than moving them
    between threads.
    """
    VECTOR: tl.constexpr = 8 if ROTARY % 8 == 0 else 1
    d = tl.arange(0, BLOCK_D)
    turns = d < 2 * ROTARY
    angle = tl.where(d < ROTARY, d, d - ROTARY)
    partner = tl.where(d < ROTARY, d + ROTARY, d - ROTARY)
    angle = tl.max_contiguous(tl.multiple_of(angle, VECTOR), VECTOR)
    partner = tl.max_contiguous(tl.multiple_of(partner, VECTOR), VECTOR)
    x = tl.load(heads + d[None, :], valid & (d < HEAD_DIM)[None, :], 0.0).to(tl.float32)
    y = tl.load(heads + partner[None, :], valid & turns[None, :], 0.0).to(tl.float32)
    c = tl.load(cos + angle, turns, 1.0)
    s = tl.load(sin + angle, turns, 0.0)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x = x * scale * tl.load(weight + d, d < HEAD_DIM, 0.0).to(tl.float32)[None, :]
        y = y * scale * tl.load(weight + partner, turns, 0.0).to(tl.float32)[None, :]
    return x * c[None, :] + y * tl.where(d < ROTARY, -s, s)[None, :]


@triton.jit
def page_codes(x, scale, dtype: tl.constexpr):
    """Float32 values as a page of ``dtype`` holds them; ``scale`` is the unit of float8 codes."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x / scale, -FP8_MAX), FP8_MAX)
    return x.to(dtype)


@triton.jit
def new_key_value(
    row,
    kv_head,
    k_norm,
    cos,
    sin,
    eps,
    k_scale,
    v_scale,
    dtype: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_PARTS: tl.constexpr,
    V_NORM: tl.constexpr,
):
    """The codes ``[1, BLOCK_D]`` of a token's k and v, whose qkv begins at ``row``."""
    head = row + (NUM_HEADS + kv_head) * HEAD_DIM + tl.arange(0, 1)[:, None]
    always = tl.full([1, 1], True, tl.int1)
    key = turned_heads(head, always, k_norm, cos, sin, eps, HEAD_DIM, ROTARY, BLOCK_D)
    d = tl.arange(0, BLOCK_D)[None, :]
    from_k: tl.constexpr = (KV_PARTS - 1) * NUM_KV_HEADS * HEAD_DIM
    value = tl.load(head + from_k + d, d < HEAD_DIM, 0.0).to(tl.float32)
    if V_NORM:
        value = value * tl.rsqrt(tl.sum(value * value, axis=1) / HEAD_DIM + eps)[:, None]
    return page_codes(key, k_scale, dtype), page_codes(value, v_scale, dtype)


@triton.jit
def store_key_value(
    pages,
    slot,
    kv_head,
    key,
    value,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)[None, :]
    page = (slot // PAGE).to(tl.int64) * (2 * NUM_KV_HEADS * PAGE * HEAD_DIM)
    to = pages + page + (kv_head * PAGE + slot % PAGE) * HEAD_DIM + d
    tl.store(to, key, d < HEAD_DIM)
    tl.store(to + NUM_KV_HEADS * PAGE * HEAD_DIM, value, d < HEAD_DIM)


@triton.jit
def page_tile(
    pages,
    number,
    index,
    first,
    end,
    PLANE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """k and v ``[BLOCK_N, BLOCK_D]`` of the keys [first, end) in a sequence's tile ``index``, the
    others zero. ``pages`` points to the head in the page numbered 0."""
    keys = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    position = index * BLOCK_N + keys
    here = ((position >= first) & (position < end))[:, None]
    if HEAD_DIM < BLOCK_D:
        here = here & (d < HEAD_DIM)[None, :]
    at = pages + number.to(tl.int64) * (2 * PLANE) + d[None, :]
    at = at + (index % (PAGE // BLOCK_N) * BLOCK_N + keys)[:, None] * HEAD_DIM
    return tl.load(at, here, 0.0), tl.load(at + PLANE, here, 0.0)


@triton.jit
def log2_scores(products, scale, soft_cap):
    """Scores from products q·k: ``scale``, and the soft cap if there is one, in units of log 2."""
    if soft_cap is not None:
        return tanh(products * (2.0 * scale / soft_cap)) * (soft_cap * LOG2_E)
    return products * scale


@triton.jit
def tanh(twice):
    """tanh(log(2) / 2 * ``twice``)."""
    return 1.0 - 2.0 / (tl.exp2(twice) + 1.0)


@triton.jit
def joined(m, total, acc, m_next, total_next, acc_next):
    """Two softmax sums as one. The rounding is spelled out: a split's sum is joined in registers
    or read back by another program, and the results must be the same bits."""
    top = tl.maximum(m, m_next)
    old = tl.exp2(m - top)
    new = tl.exp2(m_next - top)
    acc = tl.fma(acc, old[:, None], acc_next * new[:, None])
    return top, tl.fma(total, old, total_next * new), acc


@triton.jit
def group_rows(
    sequence,
    token,
    queries,
    kv_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of the rows of a group, the heads of one query after those of another: the query of each, its
    head, its place in what has one for every token and head, and whether there is one."""
    rows = tl.arange(0, ROWS)
    if QUERIES == 1:
        heads = kv_head * GROUP + rows
        return rows * 0, heads, sequence * NUM_HEADS + heads, rows < GROUP
    query = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    return query, heads, (token + query) * NUM_HEADS + heads, query < queries


@triton.jit
def store_split(partials, statistics, place, valid, m, total, acc, HEAD_DIM: tl.constexpr):
    """Leaves the sums of a split for ``add_splits``; ``place`` counts splits, a row of each."""
    d = tl.arange(0, acc.shape[1])
    wide = valid[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(statistics + 2 * place, m, valid)
    tl.store(statistics + 2 * place + 1, total, valid)
    tl.store(partials + place[:, None] * HEAD_DIM + d[None, :], acc, wide)


@triton.jit
def finish(m, total, acc, sinks, v_scale, heads, valid):
    """The attention output of sums of every key: a sink only joins the denominator."""
    total = tl.where(valid, total, 1.0)
    if sinks is not None:
        sink = tl.load(sinks + heads, valid, 0.0)
        top = tl.maximum(m, sink * LOG2_E)
        shrink = tl.exp2(m - top)
        total = tl.fma(total, shrink, tl.exp2(tl.fma(sink, LOG2_E, -top)))
        return acc * (shrink * v_scale / total)[:, None]
    return acc * (v_scale / total)[:, None]


@triton.jit(do_not_specialize=["table_stride", "window", "min_pages"])
def decode_kernel(
    qkv,
    cos,
    sin,
    pages,
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
    table_stride,
    window,
    min_pages,
    scale,
    soft_cap,
    eps,
    k_scale,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_PARTS: tl.constexpr,
    V_NORM: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One new token of each sequence, or up to QUERIES, whose k and v are in the pages and whose q
    is turned. Grid: (NUM_KV_HEADS, sequences, programs a head).

    The keys of a sequence are cut into at most MAX_SPLITS splits of whole pages, whose size follows
    from its context alone; how many programs share them changes no bit of the result. A single new
    token's k and v join the last tile from registers. The last program to arrive adds up all.
    """
    begin(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    WIDTH: tl.constexpr = (NUM_HEADS + KV_PARTS * NUM_KV_HEADS) * HEAD_DIM
    PLANE: tl.constexpr = NUM_KV_HEADS * PAGE * HEAD_DIM
    TILES: tl.constexpr = PAGE // BLOCK_N
    dtype = pages.dtype.element_ty
    operand = qkv.dtype.element_ty if dtype == tl.float8e4nv else dtype
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    part = tl.program_id(2)
    context = tl.load(context_len + sequence)
    if context <= 0:
        return

    JOINS: tl.constexpr = KV_PARTS > 0 and QUERIES == 1
    cached = context
    if JOINS:
        cached = context - 1
    token = sequence
    queries = 1
    if QUERIES > 1:
        token = tl.load(query_start + sequence)
        queries = tl.load(query_start + sequence + 1) - token
    first = tl.maximum(context - queries + 1 - window, 0)  # of the first query's keys
    first_page = first // PAGE
    num_pages = tl.cdiv(context, PAGE) - first_page
    split_pages = tl.cdiv(num_pages, MAX_SPLITS)
    splits = tl.cdiv(num_pages, split_pages)
    share = tl.maximum(tl.cdiv(splits, tl.num_programs(2)), tl.cdiv(min_pages, split_pages))
    split = part * share
    if split >= splits:
        return
    end_split = tl.minimum(split + share, splits)
    own = end_split - split
    tile = (first_page + split * split_pages) * TILES
    end_tile = (first_page + tl.minimum(end_split * split_pages, num_pages)) * TILES

    # The first tile is on its way while q is made, and every other one during the one before it.
    d = tl.arange(0, BLOCK_D)
    pages_of = page_table + sequence.to(tl.int64) * table_stride
    number = tl.load(pages_of + tile // TILES)
    next_number = tl.load(pages_of + (tile + 1) // TILES, tile + 1 < end_tile, 0)
    head_pages = pages + kv_head * (PAGE * HEAD_DIM)
    k, v = page_tile(
        head_pages, number, tile, first, cached, PLANE, HEAD_DIM, PAGE, BLOCK_D, BLOCK_N
    )

    query, heads, place, valid = group_rows(
        sequence, token, queries, kv_head, NUM_HEADS, GROUP, QUERIES, ROWS
    )
    grouped = valid[:, None]
    seen = context - queries + 1 + query  # keys of each row
    row = qkv + sequence.to(tl.int64) * WIDTH
    if QUERIES > 1:
        starts = qkv + ((token + query).to(tl.int64) * WIDTH + heads * HEAD_DIM)[:, None]
        q = tl.load(starts + d[None, :], grouped & (d < HEAD_DIM)[None, :], 0.0).to(operand)
    else:
        starts = row + heads[:, None] * HEAD_DIM
        cos += sequence * ROTARY
        sin += sequence * ROTARY
        q = turned_heads(starts, grouped, q_norm, cos, sin, eps, HEAD_DIM, ROTARY, BLOCK_D)
        q = q.to(operand)
    if JOINS:
        key, value = new_key_value(
            row,
            kv_head,
            k_norm,
            cos,
            sin,
            eps,
            k_scale,
            v_scale,
            dtype,
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            ROTARY,
            BLOCK_D,
            KV_PARTS,
            V_NORM,
        )
        if end_split == splits:
            slot = tl.load(slot_mapping + sequence)
            if slot >= 0:
                store_key_value(
                    pages, slot, kv_head, key, value, NUM_KV_HEADS, HEAD_DIM, PAGE, BLOCK_D
                )

    # Of the split at hand, and of the splits before it where one program has them all.
    m = tl.full([ROWS], NO_KEY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    all_m = tl.full([ROWS], NO_KEY, tl.float32)
    all_total = tl.zeros([ROWS], tl.float32)
    all_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    to = output + place.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
    place *= MAX_SPLITS
    left = split_pages * TILES
    for i in tl.range(tile, end_tile):
        limit = tl.where(i + 1 < end_tile, cached, 0)
        k_next, v_next = page_tile(
            head_pages, next_number, i + 1, first, limit, PLANE, HEAD_DIM, PAGE, BLOCK_D, BLOCK_N
        )
        next_number = tl.load(pages_of + (i + 2) // TILES, i + 2 < end_tile, 0)
        position = i * BLOCK_N + tl.arange(0, BLOCK_N)
        if JOINS:  # noqa: SIM102 - only this is known before a kernel runs
            if i == cached // BLOCK_N:
                new = (position == cached)[:, None]
                k = tl.where(new, key, k)
                v = tl.where(new, value, v)
        scores = log2_scores(tl.dot(q, tl.trans(k.to(operand))), scale, soft_cap)
        if QUERIES > 1:
            visible = position[None, :] < seen[:, None]
            visible = visible & (position[None, :] >= seen[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        else:
            visible = (position >= first) & (position < context)
            scores = tl.where(visible[None, :], scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, axis=1))
        shrink = tl.exp2(m - top)
        p = tl.exp2(scores - top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(operand), v.to(operand), acc * shrink[:, None])
        m = top
        k = k_next
        v = v_next
        left -= 1
        if (left == 0) & (i + 1 < end_tile):
            if own == splits:
                all_m, all_total, all_acc = joined(all_m, all_total, all_acc, m, total, acc)
            else:
                store_split(partials, statistics, place + split, valid, m, total, acc, HEAD_DIM)
            split += 1
            left = split_pages * TILES
            m = tl.full([ROWS], NO_KEY, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_D], tl.float32)

    if own == splits:
        all_m, all_total, all_acc = joined(all_m, all_total, all_acc, m, total, acc)
        y = finish(all_m, all_total, all_acc, sinks, v_scale, heads, valid)
        tl.store(to, y.to(output.dtype.element_ty), grouped & (d < HEAD_DIM)[None, :])
    else:
        store_split(partials, statistics, place + split, valid, m, total, acc, HEAD_DIM)
        arrival = arrivals + sequence * NUM_KV_HEADS + kv_head
        tl.debug_barrier()  # every thread's stores come before the arrival
        if tl.atomic_add(arrival, own, sem="acq_rel") + own == splits:
            add_splits(
                partials,
                statistics,
                sinks,
                output,
                sequence,
                token,
                queries,
                kv_head,
                splits,
                v_scale,
                NUM_HEADS,
                GROUP,
                QUERIES,
                HEAD_DIM,
                BLOCK_D,
                MAX_SPLITS,
            )
            tl.store(arrival, 0)


@triton.jit
def add_splits(
    partials,
    statistics,
    sinks,
    output,
    sequence,
    token,
    queries,
    kv_head,
    splits,
    v_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Joins the sums of a group's splits, from the first on, and stores their output.

    Other programs wrote the sums, so they are read past the first-level cache. Loads of eight
    splits are in flight together.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP * QUERIES)
    UNROLL: tl.constexpr = 8
    _, heads, place, grouped = group_rows(
        sequence, token, queries, kv_head, NUM_HEADS, GROUP, QUERIES, ROWS
    )
    d = tl.arange(0, BLOCK_D)
    wide = grouped[:, None] & (d < HEAD_DIM)[None, :]
    m = tl.full([ROWS], NO_KEY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for base in tl.range(0, splits, UNROLL):
        for j in tl.static_range(UNROLL):
            split = base + j
            here = split < splits
            at = place * MAX_SPLITS + split
            m_next = tl.load(statistics + 2 * at, grouped & here, NO_KEY, cache_modifier=".cg")
            total_next = tl.load(statistics + 2 * at + 1, grouped & here, 0.0, cache_modifier=".cg")
            acc_at = partials + at[:, None] * HEAD_DIM + d[None, :]
            acc_next = tl.load(acc_at, wide & here, 0.0, cache_modifier=".cg")
            m, total, acc = joined(m, total, acc, m_next, total_next, acc_next)
    y = finish(m, total, acc, sinks, v_scale, heads, grouped)
    to = output + place[:, None] * HEAD_DIM + d[None, :]
    tl.store(to, y.to(output.dtype.element_ty), wide)


@triton.jit(do_not_specialize=["first_token"])
def write_kernel(
    qkv,
    cos,
    sin,
    pages,
    slot_mapping,
    q_norm,
    k_norm,
    first_token,
    eps,
    k_scale,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_PARTS: tl.constexpr,
    V_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Stores k and v of the tokens from ``first_token`` on, and turns their q in place.

    Grid: (tokens, NUM_KV_HEADS).
    """
    begin(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    WIDTH: tl.constexpr = (NUM_HEADS + KV_PARTS * NUM_KV_HEADS) * HEAD_DIM
    token = first_token + tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    rows = tl.arange(0, triton.next_power_of_2(GROUP))
    d = tl.arange(0, BLOCK_D)
    row = qkv + token.to(tl.int64) * WIDTH
    cos += token * ROTARY
    sin += token * ROTARY
    starts = row + (kv_head * GROUP + rows)[:, None] * HEAD_DIM
    grouped = (rows < GROUP)[:, None]
    q = turned_heads(starts, grouped, q_norm, cos, sin, eps, HEAD_DIM, ROTARY, BLOCK_D)
    if KV_PARTS > 0:
        key, value = new_key_value(
            row,
            kv_head,
            k_norm,
            cos,
            sin,
            eps,
            k_scale,
            v_scale,
            pages.dtype.element_ty,
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            ROTARY,
            BLOCK_D,
            KV_PARTS,
            V_NORM,
        )
        store_key_value(pages, slot, kv_head, key, value, NUM_KV_HEADS, HEAD_DIM, PAGE, BLOCK_D)
    tl.debug_barrier()  # a thread overwrites what another one reads as its partner
    tl.store(starts + d[None, :], q.to(qkv.dtype.element_ty), grouped & (d < HEAD_DIM)[None, :])


@triton.jit
def page_numbers(page_table, start, end, context, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The numbers of the page of key ``start`` and of the page after it, if BLOCK_N covers both."""
    tl.static_assert(BLOCK_N <= 2 * PAGE)
    at = page_table + start // PAGE
    number = tl.load(at, start < end, 0)
    if BLOCK_N <= PAGE:
        return number, number
    return number, tl.load(at + 1, (start < end) & (start + PAGE < context), 0)


@triton.jit
def attended(
    m,
    total,
    acc,
    q,
    position,
    pages,
    page_table,
    begin,
    end,
    context,
    first,
    scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax sums after the keys [begin, end) too; ``begin`` is a multiple of BLOCK_N. What
    lies before the key ``first``, which no window reaches, may be anything."""
    PLANE: tl.constexpr = NUM_KV_HEADS * PAGE * HEAD_DIM
    unit = scale
    if soft_cap is not None:
        unit = soft_cap * LOG2_E
    keys = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    number, second = page_numbers(page_table, begin, end, context, PAGE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        if BLOCK_N <= PAGE:
            at = pages + number.to(tl.int64) * (2 * PLANE) + (start % PAGE) * HEAD_DIM
            at = at + keys[:, None] * HEAD_DIM + d[None, :]
        else:
            number = tl.where(keys < PAGE, number, second).to(tl.int64)[:, None]
            at = pages + number * (2 * PLANE) + (keys % PAGE)[:, None] * HEAD_DIM + d[None, :]
        # A tile ahead, so that no copy of a tile waits for the number of its page.
        number, second = page_numbers(page_table, start + BLOCK_N, end, context, PAGE, BLOCK_N)
        if MASKED:
            stored = start + keys < context
            if WINDOW > 0:
                stored = stored & (start + keys >= first)
            stored = stored[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(at, stored, 0.0)
            v = tl.load(at + PLANE, stored, 0.0)
        elif HEAD_DIM < BLOCK_D:
            k = tl.load(at, (d < HEAD_DIM)[None, :], 0.0)
            v = tl.load(at + PLANE, (d < HEAD_DIM)[None, :], 0.0)
        else:
            k = tl.load(at)
            v = tl.load(at + PLANE)
        scores = tl.dot(q, tl.trans(k).to(q.dtype))
        if soft_cap is not None:
            scores = tanh(scores * (2.0 * scale / soft_cap))
        if MASKED:
            visible = (start + keys)[None, :] <= position[:, None]
            if WINDOW > 0:
                visible = visible & ((start + keys)[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        # The unit joins the subtraction as one multiply-add, spelled out: a score is the same bits
        # whether its tile is masked or not.
        top = tl.maximum(m, tl.max(scores, axis=1) * unit)
        p = tl.exp2(tl.fma(scores, unit, -top[:, None]))
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
        m = top
    return m, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    qkv,
    pages,
    query_start,
    context_len,
    page_table,
    block_sequence,
    block_start,
    sinks,
    output,
    table_stride,
    scale,
    soft_cap,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Blocks of BLOCK_Q queries, whose k and v are in the pages, for a group of heads together.

    Grid: (blocks * NUM_KV_HEADS), in the order of the blocks: those with the most keys should be
    the first. Where the step's blocks are smaller, the first of those in one of ours does it all.
    """
    begin(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    WIDTH: tl.constexpr = (NUM_HEADS + KV_PARTS * NUM_KV_HEADS) * HEAD_DIM
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    block = tl.program_id(0) // NUM_KV_HEADS
    sequence = tl.load(block_sequence + block)
    if sequence < 0:
        return
    context = tl.load(context_len + sequence)
    first_token = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first_token
    start = tl.load(block_start + block)
    if (context <= 0) | (start >= queries) | (start % BLOCK_Q != 0):
        return

    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = start + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    valid = (query < queries) & (rows < BLOCK_Q * GROUP)
    wide = valid[:, None] & (d < HEAD_DIM)[None, :]
    token = (first_token + query).to(tl.int64)
    q = tl.load(qkv + (token * WIDTH + heads * HEAD_DIM)[:, None] + d[None, :], wide, 0.0)
    if pages.dtype.element_ty != tl.float8e4nv:
        q = q.to(pages.dtype.element_ty)

    past = context - queries
    position = past + query
    end = past + tl.minimum(start + BLOCK_Q, queries)
    pages += kv_head * (PAGE * HEAD_DIM)
    page_table += sequence.to(tl.int64) * table_stride
    m = tl.full([BLOCK_M], NO_KEY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(past + start + 1 - WINDOW, 0)
        middle = first // BLOCK_N * BLOCK_N
    else:  # up to here every query of the block sees every key
        middle = (past + start + 1) // BLOCK_N * BLOCK_N
        m, total, acc = attended(
            m,
            total,
            acc,
            q,
            position,
            pages,
            page_table,
            0,
            middle,
            context,
            first,
            scale,
            soft_cap,
            NUM_KV_HEADS,
            HEAD_DIM,
            PAGE,
            BLOCK_D,
            BLOCK_N,
            0,
            False,
        )
    m, total, acc = attended(
        m,
        total,
        acc,
        q,
        position,
        pages,
        page_table,
        middle,
        end,
        context,
        first,
        scale,
        soft_cap,
        NUM_KV_HEADS,
        HEAD_DIM,
        PAGE,
        BLOCK_D,
        BLOCK_N,
        WINDOW,
        True,
    )
    y = finish(m, total, acc, sinks, v_scale, heads, valid)
    to = output + (token * (NUM_HEADS * HEAD_DIM) + heads * HEAD_DIM)[:, None] + d[None, :]
    tl.store(to, y.to(output.dtype.element_ty), wide)
