"""Guesses of a head on a GPU: the buffers that live there, and what runs between its runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.drafting import COLUMNS
from slipstream.plugins.drafting import cuda_kernels as kernels

BLOCK = 2048  # logits of a program
_TOKENS = 128  # of a step, of a program


@dataclass(frozen=True, slots=True)
class DraftBuffers:
    """Device memory of fixed addresses, int32: T tokens of a step, S sequences, R rows of guesses.

    ``following [T]``: the token after each of a step. ``last`` and ``position [S]``: the token of
    each sequence in the step that guesses come after, and its position. ``ids``, ``positions``,
    ``slots [R]`` and ``context_len [S]``: a run for guesses. ``guesses [S, COLUMNS]``: the result,
    -1 where there is none. ``known`` has the target's token for each of the head's, None where they
    are the same. The others are scratch.
    """

    following: Tensor
    last: Tensor
    position: Tensor
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
        device: torch.device,
    ) -> DraftBuffers:
        """For steps of up to so many tokens and sequences, and a head that knows ``vocab_size``
        tokens."""

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        blocks = triton.cdiv(vocab_size, BLOCK)
        return cls(
            following=new(tokens),
            last=new(sequences),
            position=new(sequences),
            ids=new(rows),
            positions=new(rows),
            slots=new(rows),
            context_len=new(sequences),
            guesses=new(sequences, COLUMNS),
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


def follow(  # noqa: PLR0913 - the kernel's inputs
    token_ids: Tensor,
    positions: Tensor,
    query_start: Tensor,
    next_ids: Tensor,
    first_rows: Tensor,
    drafts: Tensor,
    sampled: Tensor,
    buffers: DraftBuffers,
    pdl: bool,
) -> None:
    """Fill ``following``, ``last`` and ``position`` from a step of T tokens and S sequences that
    has been sampled; see ``follow_kernel``."""
    tokens, sequences = token_ids.shape[0], first_rows.shape[0]
    kernels.follow_kernel[(max(sequences, triton.cdiv(tokens, _TOKENS)),)](
        token_ids,
        positions,
        query_start,
        next_ids,
        first_rows,
        drafts,
        sampled,
        buffers.following,
        buffers.last,
        buffers.position,
        tokens,
        sequences,
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
    kernels.places_kernel[(sequences,)](
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
