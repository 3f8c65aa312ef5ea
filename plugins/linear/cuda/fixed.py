"""The tactics of the deterministic mode: the bits of a row do not depend on the rows beside it.

Tensor cores add up an element of a product along K in steps of one instruction, in order, so tiles
may follow the number of tokens, and shares of programs too. What decides bits follows from the
weight alone: which operand the weight is, into how many parts K is cut, and over how many elements
a scale of a block is applied. The norm is a kernel before the product, x is never rounded, and
neither GEMVs, whose sums are of another order, nor a library take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slipstream.errors import EngineMismatchError
from slipstream.plugins.linear.cuda.packing import in_words
from slipstream.plugins.linear.cuda.tactics import (
    DOT_TOKENS,
    Tactic,
    Tactics,
    block_m,
    can_stream,
    fit_stages,
    weight_key,
)
from slipstream.weights.tensor import WeightFormat

_FEW_TOKENS = 64
_BLOCK_SCALE = 128  # elements of K of a scale of a block
# Programs that fill a GPU where few tokens wait for the weight: decoding in registers takes more.
_PROGRAMS_16_BIT, _PROGRAMS = 128, 192
_MOST_PARTS = 4


@dataclass(slots=True)
class FixedTactics(Tactics):
    """A table that answers without what was timed, which differs from bucket to bucket."""

    deterministic: ClassVar[bool] = True

    def find(self, fmt: WeightFormat, gated: bool, tokens: int) -> Tactic:
        """The tactic of the mode; EngineMismatchError for a weight that it has no kernel for."""
        return fixed_tactic(fmt, gated, tokens, self.capability)


def fixed_tactic(
    fmt: WeightFormat, gated: bool, tokens: int, capability: tuple[int, int]
) -> Tactic:
    """A dot whose bits depend on the weight's format and shape, and not on ``tokens``."""
    if not can_stream(fmt):
        raise EngineMismatchError(
            f"deterministic mode multiplies rows of whole vectors of 16 bytes, and a weight "
            f"{weight_key(fmt)} has rows of {fmt.shape[1]} elements; run without --deterministic"
        )
    swap = weight_is_left(capability)
    parts = 1 if gated else parts_of_k(fmt)
    few = tokens <= _FEW_TOKENS
    block_n, warps = (64, 4) if few or not swap else (128, 8)
    if not swap and gated and tokens > 32:  # two sums of a tile do not fit the registers
        block_n = 32
    found = Tactic(
        "dot",
        block_n,
        128 if few or fmt.rows > 1 else 64,
        warps,
        6,
        split_k=parts,
        swap=swap,
        serial=parts > 1 and tokens > DOT_TOKENS,
    )
    return fit_stages(found, fmt, gated, block_m(tokens), capability)


def weight_is_left(capability: tuple[int, int]) -> bool:
    """Whether the weight is the left operand, whose 64 rows fill an instruction however few the
    tokens are: older tensor cores, and those of small Blackwells, have one shape for all."""
    return capability[0] in (9, 10)


def parts_of_k(fmt: WeightFormat) -> int:
    """Into how many parts K is cut, so that few tokens get enough programs."""
    programs = _PROGRAMS_16_BIT if fmt.kind == "dense" else _PROGRAMS
    whole = 1024 // fmt.bits if in_words(fmt) else _BLOCK_SCALE
    tiles, k = -(-fmt.shape[0] // 64), fmt.shape[1]
    parts = 1
    # Steps are of 64 elements or of a whole: parts are the same only where both divide them.
    while parts < _MOST_PARTS and tiles * parts < programs and k % (2 * parts * whole) == 0:
        parts *= 2
    return parts
