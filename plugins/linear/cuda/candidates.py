"""The tactics of a Linear that tuning times."""

from __future__ import annotations

from dataclasses import replace

from slipstream.plugins.linear.cuda.packing import in_words
from slipstream.plugins.linear.cuda.tactics import (
    DOT_TOKENS,
    GEMV_TOKENS,
    PROCESSORS,
    Tactic,
    block_m,
    can_stream,
    can_widen,
    default_tactic,
    fit_stages,
    multiplies_in,
    vector_size,
    wide_tactic,
)
from slipstream.plugins.linear.cuda.wide import tiles_to_time
from slipstream.weights.tensor import WeightFormat


def candidate_tactics(
    fmt: WeightFormat, gated: bool, tokens: int, capability: tuple[int, int]
) -> list[Tactic]:
    """What is worth timing, the default first."""
    found = [default_tactic(fmt, gated, tokens, capability)]
    if can_stream(fmt) and tokens <= GEMV_TOKENS:
        found += _gemv_candidates(fmt, gated, tokens)
        found += [replace(found[0], fuse_norm=False)]
    if can_stream(fmt) and 2 <= tokens <= DOT_TOKENS:
        found += _dot_candidates(fmt, gated, tokens, capability)
        if capability[0] == 9 and multiplies_in(fmt) == "float8":
            found += _rounding_candidates(fmt, gated, tokens, capability)
    if can_widen(fmt, tokens, capability):
        found += [wide_tactic(tile, gated) for tile in tiles_to_time(fmt.shape[0], tokens)]
    return list(dict.fromkeys([*found, Tactic("blas")]))


def _gemv_candidates(fmt: WeightFormat, gated: bool, tokens: int) -> list[Tactic]:
    """Warps, lanes along K, vectors a thread, stages; a gated row is two vectors."""
    choices = [
        (4, 32, 2, 1), (4, 32, 2, 2), (4, 32, 4, 1), (4, 32, 4, 2), (8, 32, 2, 1), (8, 32, 2, 2),
        (8, 64, 4, 1), (8, 64, 2, 2), (2, 32, 4, 1),
    ]  # fmt: skip
    if not gated and not in_words(fmt):
        choices += [(8, 32, 1, 2), (8, 32, 1, 4), (4, 32, 1, 4)]
    if in_words(fmt) and tokens == 1:
        choices += [(4, 32, 8, 1), (4, 64, 8, 1)]
    return [
        Tactic(
            "gemv",
            block_n=32 * warps // lanes * vectors // (2 if gated else 1),
            block_k=lanes * vector_size(fmt),
            num_warps=warps,
            num_stages=stages,
            fuse_norm=True,
        )
        for warps, lanes, vectors, stages in choices
    ]


def _dot_candidates(
    fmt: WeightFormat, gated: bool, tokens: int, capability: tuple[int, int]
) -> list[Tactic]:
    """Rows and elements of K of a tile, warps, and whether the weight is on the left."""
    whole = 1024 // fmt.bits if in_words(fmt) else 0
    choices = [(16, 256, 4, False), (32, 128, 4, False), (64, 128, 4, False), (32, 64, 4, False)]
    if tokens > 64:
        choices = [(32, 64, 4, False), (64, 64, 4, False), (128, 64, 8, False)]
    if capability[0] == 9:
        choices += [(64, 128, 4, True), (64, 64, 4, True), (128, 64, 8, True)]
    width = fmt.shape[0] // (2 if gated else 1)
    found = []
    for rows, columns, warps, swap in choices:
        programs = -(-width // rows)
        for split in (1, 2, 4) if tokens <= 64 or whole else (1,):
            if split > 1 and programs * split > 4 * PROCESSORS:
                continue
            columns = whole or min(columns, 128 if fmt.rows > 1 else columns)
            tactic = Tactic("dot", rows, columns, warps, 6, False, split, swap)
            found.append(fit_stages(tactic, fmt, gated, block_m(tokens), capability))
    return found


def _rounding_candidates(
    fmt: WeightFormat, gated: bool, tokens: int, capability: tuple[int, int]
) -> list[Tactic]:
    """Products of float8 with float8, whose tiles have all tokens, so that a weight is read once:
    rows and elements of K of a tile, warps, stages, and whether the weight is on the left."""
    if tokens <= 32:
        choices = [(64, 128, 4, 6, True), (64, 256, 4, 4, True), (32, 256, 4, 4, False)]
    elif tokens <= 128:
        choices = [(64, 128, 4, 6, True), (128, 128, 8, 4, True), (64, 128, 4, 6, False)]
        choices += [(64, 256, 4, 3, True)]
    else:
        choices = [(64, 128, 4, 4, True), (64, 128, 8, 4, True), (64, 128, 8, 4, False)]
    width, tile = fmt.shape[0] // (2 if gated else 1), 256 if tokens > 128 else block_m(tokens)
    found = []
    for rows, columns, warps, stages, swap in choices:
        programs = -(-width // rows)
        for split in (1, 2, 4):
            if programs * split <= 4 * PROCESSORS and (programs * split >= 64 or split == 4):
                tactic = Tactic(
                    "dot", rows, columns, warps, stages, False, split, swap, tile, rounds=True
                )
                found.append(fit_stages(tactic, fmt, gated, tile, capability))
    return found
