"""Who reads what of a step of decodes: computed on the device, once for all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.paged_attention.reference import Attributes

_FEW, _MANY = 128, 1024  # sequences that are looked at together, by one warp and by four
# A small share, and what a program takes that waits for another to end: pages.
SMALL, WAIT = tl.constexpr(16), tl.constexpr(3)
PARTS = tl.constexpr(64)  # an entry is its sequence times this and its part, of at most 32


@triton.jit
def pages_of(context, PAGE: tl.constexpr, JOINS: tl.constexpr):
    """Pages that hold the keys of a context, without that of a new token that joins them; the page
    of a first token has none, and is read all the same. Without context there are none."""
    cached = context
    if JOINS:
        cached = context - 1
    return tl.where(context > 0, tl.maximum(tl.cdiv(cached, PAGE), 1), 0)


@triton.jit
def parts_of(pages, even, MAX_SPLITS: tl.constexpr):
    """Parts of so many pages: whole splits, of about ``even`` pages each."""
    split_pages = tl.maximum(tl.cdiv(pages, MAX_SPLITS), 1)
    return tl.cdiv(tl.cdiv(pages, split_pages), tl.cdiv(even, split_pages))


@triton.jit
def totals(
    context_len,
    sequences,
    even,
    PAGE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    JOINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of all sequences: those with a context, pages and parts."""
    index = tl.arange(0, BLOCK)
    there, pages, parts = 0, 0, 0
    for start in range(0, sequences, BLOCK):
        context = tl.load(context_len + start + index, start + index < sequences, 0)
        of_each = pages_of(context, PAGE, JOINS)
        there += tl.sum((context > 0).to(tl.int32), 0)
        pages += tl.sum(of_each, 0)
        parts += tl.sum(parts_of(of_each, even, MAX_SPLITS), 0)
    return there, pages, parts


@triton.jit(do_not_specialize=["sequences", "slots", "programs"])
def plan_kernel(
    context_len,
    plan,
    sequences,
    slots,
    programs,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    JOINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """``plan [1 + programs]``: the pages of an even share, if ``slots`` programs of all kv heads
    run at a time, then an entry for each program of a head, or -1. Grid: (1,).

    A small share grows where some programs would wait for room, to do hardly anything. Whole shares
    come first: what is less fills the end.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    there, pages, _ = totals(context_len, sequences, 1, PAGE, MAX_SPLITS, JOINS, BLOCK)
    even = tl.maximum(tl.cdiv(pages * NUM_KV_HEADS, slots), 1)
    for _ in range(WAIT):
        _, _, wanted = totals(context_len, sequences, even, PAGE, MAX_SPLITS, JOINS, BLOCK)
        if (wanted * NUM_KV_HEADS > slots) & (there * NUM_KV_HEADS <= slots) & (even < SMALL):
            even += 1
    tl.store(plan, even)
    _, _, parts = totals(context_len, sequences, even, PAGE, MAX_SPLITS, JOINS, BLOCK)
    index, place, last_place = tl.arange(0, BLOCK), 1, 1 + parts - there
    for start in range(0, sequences, BLOCK):
        context = tl.load(context_len + start + index, start + index < sequences, 0)
        last = parts_of(pages_of(context, PAGE, JOINS), even, MAX_SPLITS) - 1
        whole, some = tl.maximum(last, 0), (last >= 0).to(tl.int32)
        entry = (start + index) * PARTS
        to = plan + place + tl.cumsum(whole, 0) - whole
        for part in range(tl.max(whole, 0)):
            tl.store(to + part, entry + part, part < whole)
        tl.store(plan + last_place + tl.cumsum(some, 0) - some, entry + last, last >= 0)
        place += tl.sum(whole, 0)
        last_place += tl.sum(some, 0)
    for start in range(1 + parts, programs + 1, BLOCK):
        tl.store(plan + start + index, -1, start + index <= programs)


def programs_of(sequences: int, slots: int, num_kv_heads: int) -> int:
    """Programs of a kv head that have all work of any step of so many sequences, where ``slots`` of
    all heads run at a time: one for each sequence, and every part of it but the last has an even
    share of the step, of which there are no more than slots."""
    return sequences + slots // num_kv_heads


def make_plan(
    context_len: torch.Tensor, slots: int, max_splits: int, a: Attributes, *, joins: bool, pdl: bool
) -> torch.Tensor:
    """The plan of decodes of these contexts, int32 ``[S]``; 0 is none."""
    sequences = len(context_len)
    programs, few = programs_of(sequences, slots, a.num_kv_heads), sequences <= _FEW
    plan = torch.empty(1 + programs, dtype=torch.int32, device=context_len.device)
    plan_kernel[(1,)](
        context_len,
        plan,
        sequences,
        slots,
        programs,
        NUM_KV_HEADS=a.num_kv_heads,
        PAGE=a.page_size,
        MAX_SPLITS=max_splits,
        JOINS=joins,
        BLOCK=_FEW if few else _MANY,
        PDL=pdl,
        **launch_options(num_warps=1 if few else 4, pdl=pdl),
    )
    return plan
