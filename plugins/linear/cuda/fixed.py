"""The tactics of the deterministic mode: the bits of a row do not depend on the rows beside it.

Tensor cores add up an element of a product along K in steps of one instruction, in order, so tiles
may follow the number of tokens. What decides bits follows from the weight alone: which operand it
is, into how many parts K is cut, over how many elements a scale of a block is applied, and whether
x is rounded, which it is where the checkpoint says so and the product of float8 is then quick at
every number of tokens. The norm is always a kernel before the product. GEMVs, whose sums are of
another order, and libraries take no part.
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
    multiplies_in,
    weight_key,
)
from slipstream.weights.tensor import WeightFormat

_FEW_TOKENS = 64
_STEP = 128  # elements of K, as many as a scale of a block has
# Programs that fill a GPU where few tokens wait for the weight, of 16 bits or of less.
_PROGRAMS, _CODED_PROGRAMS = 96, 192
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
    swap, rounds = weight_is_left(capability), multiplies_in(fmt) == "float8"
    few, step = tokens <= _FEW_TOKENS, _step(fmt, rounds)
    parts = 1 if gated else _parts_of_k(fmt, step)
    block_n, warps = _rows(fmt, gated, tokens, swap)
    found = Tactic(
        "dot",
        block_n,
        step if few else _STEP if rounds or fmt.rows > 1 else 64,
        warps,
        6 if few and not (gated and in_words(fmt)) and not rounds else 4,
        split_k=parts,
        swap=swap,
        serial=parts > 1 and tokens > DOT_TOKENS,
        rounds=rounds,
    )
    return fit_stages(found, fmt, gated, block_m(tokens), capability)


def weight_is_left(capability: tuple[int, int]) -> bool:
    """Whether the weight is the left operand, whose 64 rows fill an instruction however few the
    tokens are: older tensor cores, and those of small Blackwells, have one shape for all."""
    return capability[0] in (9, 10)


def _rows(fmt: WeightFormat, gated: bool, tokens: int, swap: bool) -> tuple[int, int]:
    """Rows of the weight of a tile, and warps; two sums of a tile need twice the registers."""
    if not swap:
        return (32 if gated and tokens > 32 else 64), 4
    decodes = in_words(fmt) and tokens > 32
    return (128, 8) if decodes or tokens > _FEW_TOKENS else (64, 4)


def _step(fmt: WeightFormat, rounds: bool) -> int:
    """Elements of K of the longest step."""
    if in_words(fmt):
        return 1024 // fmt.bits
    return 2 * _STEP if rounds else _STEP


def _parts_of_k(fmt: WeightFormat, step: int) -> int:
    """Into how many parts K is cut, so that few tokens get enough programs."""
    programs = _PROGRAMS if fmt.kind == "dense" else _CODED_PROGRAMS
    tiles, k = -(-fmt.shape[0] // 64), fmt.shape[1]
    parts = 1
    # Shorter steps divide the longest: where that divides the parts, all cut K at the same places.
    while parts < _MOST_PARTS and tiles * parts < programs and k % (2 * parts * step) == 0:
        parts *= 2
    return parts
