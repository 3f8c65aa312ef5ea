"""Guesses of a head on a GPU: the buffers that live there, and what runs between its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.drafting import COLUMNS
from slipstream.plugins.drafting import cuda_kernels as kernels
from slipstream.plugins.sampling import Field

BLOCK = 2048  # logits of a program
_TOKENS = 128  # of a step, of a program


@dataclass(frozen=True, slots=True)
class DraftBuffers:
    """Device memory of fixed addresses, int32: T tokens of a step, S sequences, R rows of guesses.

    Kept from step to step, by slot: ``last_tokens [slots]``, what came last; ``runs [slots]``, by
    how many tokens more than one the host is behind; ``moved [slots]``, by how many the step at
    hand was moved on; ``guesses [slots + 1, COLUMNS]``, -1 where there is none, of which the last
    row is nobody's.

    ``following [T]``: the token after each of a step. ``last`` and ``position [S]``: the token of
    each sequence in the step that guesses come after, and its position. ``owner [S]``: its slot.
    ``ids``, ``positions``, ``slots [R]`` and ``context_len [S]``: a run for guesses. ``known`` has
    the target's token for each of the head's, None where they are the same. The others are scratch.
    """

    last_tokens: Tensor
    runs: Tensor
    moved: Tensor
    following: Tensor
    last: Tensor
    position: Tensor
    owner: Tensor
    ids: Tensor
    positions: Tensor
    slots: Tensor
    context_len: Tensor
    guesses: Tensor
    known: Tensor | None
    block_max: Tensor
    block_id: Tensor

    @classmethod
    def allocate(
        cls,
        tokens: int,
        sequences: int,
        rows: int,
        vocab_size: int,
        known: Tensor | None,
        last_tokens: Tensor,
    ) -> DraftBuffers:
        """For steps of up to so many tokens and sequences, and a head that knows ``vocab_size``
        tokens; ``last_tokens`` are the sampler's."""
        device, slots = last_tokens.device, len(last_tokens)

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        blocks = triton.cdiv(vocab_size, BLOCK)
        return cls(
            last_tokens=last_tokens,
            runs=new(slots),
            moved=new(slots),
            following=new(tokens),
            last=new(sequences),
            position=new(sequences),
            owner=new(sequences),
            ids=new(rows),
            positions=new(rows),
            slots=new(rows),
            context_len=new(sequences),
            guesses=new(slots + 1, COLUMNS),
            known=known,
            block_max=new(rows, blocks, dtype=torch.float32),
            block_id=new(rows, blocks),
        )


@dataclass(frozen=True, slots=True)
class Pages:
    """Where sequences lie: ``table [S, P]``, how many tokens the pages of each hold, ``capacity
    [S]``, and how many one page does."""

    table: Tensor
    capacity: Tensor
    size: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Those of a step, of which the last ``drafts [S]`` of each sequence are drafts."""

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    token_slots: Tensor
    drafts: Tensor


@dataclass(frozen=True, slots=True)
class Table:
    """Where the keys of a step's tokens go in a cache: ``slots [T]``, by the page table ``[S, P]``
    of pages of ``size`` tokens."""

    pages: Tensor
    slots: Tensor
    size: int


def advance(
    tokens: Tokens,
    context_len: Tensor,
    tables: Sequence[Table],
    history: Tensor,
    vocab_size: int,
    buffers: DraftBuffers,
    pdl: bool,
) -> None:
    """Put into a step, before its layers, what the host did not know, and drafts into the
    ``history [slots, ...]`` of sampling; see ``advance_kernel``."""
    sequences = tokens.drafts.shape[0]
    kernels.advance_kernel[(sequences,)](
        tokens.token_ids,
        tokens.positions,
        tokens.query_start,
        context_len,
        tokens.token_slots,
        tokens.drafts,
        buffers.last_tokens,
        buffers.runs,
        buffers.moved,
        buffers.guesses,
        vocab_size,
        history,
        history.stride(0),
        PDL=pdl,
        **launch_options(num_warps=1, pdl=pdl),
    )
    for table in tables:
        kernels.places_kernel[(sequences,)](
            tokens.positions,
            tokens.query_start,
            tokens.token_slots,
            buffers.moved,
            table.pages,
            table.pages.stride(0),
            table.slots,
            PAGE=table.size,
            PDL=pdl,
            **launch_options(num_warps=1, pdl=pdl),
        )


def move_rows(params: Tensor, rows: int, buffers: DraftBuffers, pdl: bool) -> None:
    """Add to the positions of the first ``rows`` of the sampler's ``params`` what the host did not
    know of them; once a step."""
    kernels.moved_kernel[(triton.cdiv(rows, _TOKENS),)](
        params[Field.SLOT],
        params[Field.POSITION],
        buffers.moved,
        rows,
        BLOCK=_TOKENS,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )


def follow(
    tokens: Tokens,
    next_ids: Tensor,
    first_rows: Tensor,
    sampled: Tensor,
    buffers: DraftBuffers,
    pdl: bool,
) -> None:
    """Fill ``following``, ``last``, ``position`` and ``owner``, and what is kept by slot, from a
    step of T tokens and S sequences that has been sampled; see ``follow_kernel``."""
    count, sequences = tokens.token_ids.shape[0], first_rows.shape[0]
    kernels.follow_kernel[(max(sequences, triton.cdiv(count, _TOKENS)),)](
        tokens.token_ids,
        tokens.positions,
        tokens.query_start,
        next_ids,
        first_rows,
        tokens.drafts,
        sampled,
        tokens.token_slots,
        buffers.following,
        buffers.last,
        buffers.position,
        buffers.owner,
        buffers.last_tokens,
        buffers.runs,
        count,
        sequences,
        len(buffers.runs),
        BLOCK=_TOKENS,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )


def guess(
    logits: Tensor,
    buffers: DraftBuffers,
    pages: Pages,
    column: int,
    each: int,
    goes_on: bool,
    pdl: bool,
) -> None:
    """Take the likeliest token of every row of float32 ``[S * each, V]``, contiguous, as guesses
    from ``column`` on; where it ``goes_on``, the head is to run on them next."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and rows <= len(buffers.block_max), logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    kernels.best_kernel[(blocks, rows)](
        logits,
        vocab,
        buffers.block_max,
        buffers.block_id,
        BLOCK=BLOCK,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    kernels.guess_kernel[(rows,)](
        buffers.block_max,
        buffers.block_id,
        blocks,
        vocab,
        buffers.known,
        buffers.guesses,
        buffers.owner,
        column,
        buffers.position,
        pages.capacity,
        pages.table,
        pages.table.stride(0),
        buffers.ids,
        buffers.positions,
        buffers.context_len,
        buffers.slots,
        PAGE=pages.size,
        BLOCKS=triton.next_power_of_2(blocks),
        EACH=each,
        AFTER=column > 0,
        GOES_ON=goes_on,
        PDL=pdl,
        **launch_options(num_warps=1, pdl=pdl),
    )


def mask(
    mask_token: int, sequences: int, each: int, buffers: DraftBuffers, pages: Pages, pdl: bool
) -> None:
    """Let the head's next run be ``each`` places of every sequence that hold ``mask_token``."""
    kernels.masked_kernel[(sequences,)](
        mask_token,
        buffers.position,
        pages.capacity,
        pages.table,
        pages.table.stride(0),
        buffers.ids,
        buffers.positions,
        buffers.context_len,
        buffers.slots,
        PAGE=pages.size,
        EACH=each,
        PDL=pdl,
        **launch_options(num_warps=1, pdl=pdl),
    )
