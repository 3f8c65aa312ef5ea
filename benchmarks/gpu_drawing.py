"""Draws which drafts of a step are right, on the GPU that goes on from them."""
# ruff: noqa: ANN001, ANN202, PLR0913
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slipstream.plugins.drafting import COLUMNS
from slipstream.plugins.drafting.cuda import Tokens


def draw_drafts(
    tokens: Tokens, first_rows: Tensor, sampled: Tensor, chance: float, vocab_size: int
) -> None:
    """Let each draft of a step that was sampled be what came, with a chance, or else not."""
    _draw[(len(first_rows),)](
        tokens.token_ids,
        tokens.positions,
        tokens.query_start,
        tokens.token_slots,
        tokens.drafts,
        first_rows,
        sampled,
        chance,
        vocab_size,
        COLUMNS=COLUMNS,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["chance", "vocab"])
def _draw(
    token_ids,
    positions,
    query_start,
    token_slots,
    drafts,
    first_rows,
    sampled,
    chance,
    vocab,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(0)
    count = tl.load(drafts + sequence)
    first = tl.load(first_rows + sequence)
    if (count > 0) & (first >= 0):
        begins = tl.load(query_start + sequence + 1) - count
        slot = tl.load(token_slots + begins)
        index = tl.arange(0, COLUMNS)
        inside = index < count
        draft = tl.load(token_ids + begins + index, mask=inside, other=0)
        place = tl.load(positions + begins + index, mask=inside, other=0)
        right = tl.rand(7, place * 4096 + slot) < chance
        tl.store(sampled + first + index, tl.where(right, draft, (draft + 1) % vocab), inside)
