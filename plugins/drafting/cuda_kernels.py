"""The kernels between the runs of a head, and before the layers of a step that the host has planned
without its tokens.

advance_kernel  a step's tokens, positions and contexts, as the step before has left its sequences
places_kernel   where their keys go
moved_kernel    the positions of the rows that are sampled
follow_kernel   what follows every token of a step, and where each sequence has come to
best_kernel     the largest logits of blocks of the head's vocabulary
guess_kernel    the guess that they make, which the next run of the head reads
masked_kernel   places behind the first guess, for a head that makes the others at once
"""

import triton
import triton.language as tl

from slipstream.plugins import drafting
from slipstream.plugins.cuda.kernels import begin

COLUMNS = tl.constexpr(drafting.COLUMNS)
INF = tl.constexpr(float("inf"))
NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["vocab", "history_stride"])
def advance_kernel(
    token_ids,
    positions,
    query_start,
    context_len,
    token_slots,
    drafts,
    last_tokens,
    runs,
    moved,
    guesses,
    vocab,
    history,
    history_stride,
    PDL: tl.constexpr,
):
    """Grid: sequences. Drafts of -1 become the ``guesses`` [slots, COLUMNS] of the sequence, 0
    where there is none that the target knows, also in its ``history`` [slots, ...]. Where its first
    token is -1, that becomes the last one, and all positions and the context grow by what the run
    before exceeded one token: ``runs`` [slots], which is then 0. ``moved`` [slots] says by how much
    they grew."""
    begin(PDL)
    sequence = tl.program_id(0)
    first = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1)
    if end > first:  # else it is padding
        slot = tl.load(token_slots + first)
        token = tl.load(token_ids + first)
        more = tl.where(token < 0, tl.load(runs + slot), 0)
        context = tl.load(context_len + sequence)
        index = tl.arange(0, COLUMNS)
        count = tl.load(drafts + sequence)
        place = end - count + index
        known = tl.load(token_ids + place, mask=index < count, other=0)
        guess = tl.load(guesses + slot * COLUMNS + index)
        guess = tl.where((guess >= 0) & (guess < vocab), guess, 0)
        unknown = (index < count) & (known < 0)
        tl.store(token_ids + place, guess, unknown)
        at = tl.load(positions + place, mask=unknown, other=0) + more
        tl.store(history + slot.to(tl.int64) * history_stride + at, guess, unknown)
        inside = (first + index < end) & (token < 0)
        at = tl.load(positions + first + index, mask=inside, other=0)
        tl.store(positions + first + index, at + more, inside)
        tl.store(context_len + sequence, context + more)
        tl.store(runs + slot, 0)
        tl.store(moved + slot, more)
        tl.store(token_ids + first, tl.load(last_tokens + slot), token < 0)


@triton.jit(do_not_specialize=["table_stride"])
def places_kernel(
    positions,
    query_start,
    token_slots,
    moved,
    page_table,
    table_stride,
    slots,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: sequences. ``slots`` [T] of those that have ``moved`` [slots], by their positions."""
    begin(PDL)
    sequence = tl.program_id(0)
    first = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1)
    if end > first:
        more = tl.load(moved + tl.load(token_slots + first))
        index = tl.arange(0, COLUMNS)
        inside = (first + index < end) & (more > 0)
        place = tl.load(positions + first + index, mask=inside, other=0)
        table = page_table + sequence.to(tl.int64) * table_stride
        page = tl.load(table + place // PAGE, mask=inside, other=0)
        tl.store(slots + first + index, page * PAGE + place % PAGE, inside)


@triton.jit(do_not_specialize=["rows"])
def moved_kernel(row_slots, row_positions, moved, rows, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: blocks of rows, whose positions [R] grow by what those of their slots [R] have; -1 is
    padding."""
    begin(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(row_slots + row, mask=row < rows, other=-1)
    real = slot >= 0
    position = tl.load(row_positions + row, mask=real, other=0)
    tl.store(row_positions + row, position + tl.load(moved + slot, mask=real, other=0), real)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "nobody"])
def follow_kernel(
    token_ids,
    positions,
    query_start,
    next_ids,
    first_rows,
    drafts,
    sampled,
    token_slots,
    ids,
    last,
    position,
    owner,
    last_tokens,
    runs,
    num_tokens,
    num_sequences,
    nobody,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: the more of sequences and blocks of tokens.

    ``next_ids`` [T] is the token after each, or -1 - the row that samples it; ``ids`` [T] becomes
    that token. ``first_rows`` [S] is the first row that a sequence samples, -1 for none. ``last``
    [S] becomes the last token of a sequence that counts: before its first draft that is not what
    was sampled in its place; ``position`` [S] becomes that token's, and ``owner`` [S] its slot,
    ``nobody`` where the sequence is padding. Of each slot that has sampled, ``last_tokens`` [slots]
    becomes what followed that token, and ``runs`` [slots] how many drafts were right.
    """
    begin(PDL)
    program = tl.program_id(0)
    places = program * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_tokens
    known = tl.load(next_ids + places, mask=inside, other=0)
    rows = -1 - known
    token = tl.load(sampled + tl.maximum(rows, 0), mask=inside & (rows >= 0), other=0)
    tl.store(ids + places, tl.maximum(tl.where(rows >= 0, token, known), 0), inside)
    if program < num_sequences:
        first = tl.load(first_rows + program)
        count = tl.load(drafts + program)
        begins = tl.maximum(tl.load(query_start + program + 1) - 1 - count, 0)
        index = tl.arange(0, COLUMNS)
        guessed = (index < count) & (first >= 0)
        guess = tl.load(token_ids + begins + 1 + index, mask=guessed, other=-1)
        came = tl.load(sampled + tl.maximum(first, 0) + index, mask=guessed, other=-2)
        right = tl.min(tl.where(guess == came, COLUMNS, index))
        tl.store(last + program, begins + right)
        tl.store(position + program, tl.load(positions + begins + right))
        real = tl.load(query_start + program + 1) > tl.load(query_start + program)
        slot = tl.load(token_slots + begins)
        tl.store(owner + program, tl.where(real, slot, nobody))
        ended = real & (first >= 0)
        came_last = tl.load(sampled + first + right, mask=ended, other=0)
        tl.store(last_tokens + slot, tl.maximum(came_last, 0), ended)
        tl.store(runs + slot, right, ended)


@triton.jit
def best_kernel(logits, vocab, block_max, block_id, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid: blocks of the vocabulary, rows; logits float32 [rows, vocab]."""
    begin(PDL)
    block, row = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=-INF)
    best = tl.max(values)
    place = row * tl.num_programs(0) + block
    tl.store(block_max + place, best)
    tl.store(block_id + place, tl.min(tl.where(values == best, ids, NO_ID)))


@triton.jit(do_not_specialize=["column", "table_stride"])
def guess_kernel(
    block_max,
    block_id,
    blocks,
    vocab,
    known,
    guesses,
    owner,
    column,
    position,
    capacity,
    page_table,
    table_stride,
    ids,
    positions,
    context_len,
    slots,
    PAGE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EACH: tl.constexpr,
    AFTER: tl.constexpr,
    GOES_ON: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: rows, ``EACH`` of every sequence.

    In the row of a sequence's ``owner`` [S], ``guesses`` [slots + 1, COLUMNS] get, from ``column``
    on, the likeliest token of each row, that of the target where the head's own are ``known``
    otherwise; -1 where the row is ``AFTER`` another guess and had no slot. Where it ``GOES_ON``,
    ``ids``, ``positions``, ``context_len`` and ``slots`` [S] become those of the guess, at the
    place after ``position`` [S], which moves; a place beyond the ``capacity`` [S] of a sequence, in
    tokens, has the slot -1.
    """
    begin(PDL)
    row = tl.program_id(0)
    sequence = row // EACH
    index = tl.arange(0, BLOCKS)
    values = tl.load(block_max + row * blocks + index, mask=index < blocks, other=-INF)
    places = tl.load(block_id + row * blocks + index, mask=index < blocks, other=NO_ID)
    best = tl.min(tl.where(values == tl.max(values), places, NO_ID))
    token = tl.minimum(best, vocab - 1)  # of NaN, none is the largest
    if known is not None:
        token = tl.load(known + token)
    guess = token
    if AFTER:
        guess = tl.where(tl.load(slots + row) >= 0, token, -1)
    slot = tl.load(owner + sequence)
    tl.store(guesses + slot * COLUMNS + column + row % EACH, guess)
    if GOES_ON:
        place = tl.load(position + sequence) + 1
        fits = place < tl.load(capacity + sequence)
        table = page_table + sequence.to(tl.int64) * table_stride
        page = tl.load(table + place // PAGE, mask=fits, other=0)
        tl.store(position + sequence, place)
        tl.store(ids + row, token)
        tl.store(positions + row, place)
        tl.store(context_len + row, tl.where(fits, place + 1, 0))
        tl.store(slots + row, tl.where(fits, page * PAGE + place % PAGE, -1))


@triton.jit(do_not_specialize=["mask_token", "table_stride"])
def masked_kernel(
    mask_token,
    position,
    capacity,
    page_table,
    table_stride,
    ids,
    positions,
    context_len,
    slots,
    PAGE: tl.constexpr,
    EACH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: sequences. The ``EACH`` places after ``position`` [S] hold the mask token, as far as
    the ``capacity`` of the sequence goes; ``ids``, ``positions`` and ``slots`` are [S * EACH]."""
    begin(PDL)
    sequence = tl.program_id(0)
    index = tl.arange(0, COLUMNS)
    inside = index < EACH
    place = tl.load(position + sequence) + 1 + index
    capacity = tl.load(capacity + sequence)
    fits = place < capacity
    table = page_table + sequence.to(tl.int64) * table_stride
    page = tl.load(table + place // PAGE, mask=inside & fits, other=0)
    rows = sequence * EACH + index
    tl.store(ids + rows, tl.zeros_like(rows) + mask_token, inside)
    tl.store(positions + rows, place, inside)
    tl.store(slots + rows, tl.where(fits, page * PAGE + place % PAGE, -1), inside)
    total = tl.load(position + sequence) + 1 + EACH
    tl.store(context_len + sequence, tl.where(capacity > 0, total, 0))
