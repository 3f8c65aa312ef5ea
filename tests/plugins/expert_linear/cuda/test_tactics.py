"""The choice of an ExpertLinear's kernel, and what is timed of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slipstream.plugins.cuda.detect import shared_memory
from slipstream.plugins.expert_linear.cuda.tactics import (
    BUCKETS,
    GEMV_TOKENS,
    TILES,
    ExpertShape,
    candidate_tactics,
    default_tactic,
    find_tactic,
    runs_deep,
)
from slipstream.plugins.linear.cuda.tactics import Tactic, Tactics, weight_key, wide_tactic
from slipstream.plugins.linear.cuda.wide import Tile
from slipstream.weights.tensor import WeightFormat

HOPPER = (9, 0)
FORMATS = [
    WeightFormat((1536, 2048), "dense", "bfloat16"),
    WeightFormat((2048, 768), "float8_e4m3", "float32", 8, 768),
    WeightFormat((2048, 768), "float8_e4m3", "float32", 8, 128, "midpoint", 128),
    WeightFormat((2048, 768), "int", "float16", 4, 128, "midpoint"),
    WeightFormat((28672, 4096), "int", "float16", 8, 64, "zero"),
    WeightFormat((48, 90), "dense", "bfloat16"),
]


def of_qwen(fmt: WeightFormat, gated: bool = False) -> ExpertShape:
    return ExpertShape(fmt, gated, 128, 8)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), HOPPER, (10, 0)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=weight_key)
def test_tactics_are_ones_that_the_kernels_take(
    fmt: WeightFormat, gated: bool, capability: tuple[int, int]
) -> None:
    for number, top_k in ((128, 8), (8, 2), (1, 1)):
        shape = ExpertShape(fmt, gated, number, top_k)
        for tokens in (*BUCKETS, 3, 57, 8192):
            found = candidate_tactics(shape, tokens, capability)
            assert found[0] == default_tactic(shape, tokens, capability)
            assert found and len(set(found)) == len(found)
            for tactic in found:
                check(tactic, shape, tokens, capability)


def check(tactic: Tactic, shape: ExpertShape, tokens: int, capability: tuple[int, int]) -> None:
    fmt, rows = shape.format, tactic.block_n * (2 if shape.gated else 1)
    if tactic.kernel == "gemv":
        assert tokens <= GEMV_TOKENS and fmt.shape[1] % 4 == 0
        return
    assert tactic.block_m in TILES and (capability == HOPPER or not tactic.swap)
    if tactic.kernel == "wide":
        assert capability == HOPPER and tokens > 64 and rows in (64, 128, 192)
        assert tactic.num_stages * tactic.block_m * 128 <= shared_memory(capability)
        return
    assert fmt.rows == 1 or 128 % tactic.block_k == 0
    assert tactic.block_m * rows <= 128 * 32 * tactic.num_warps, "sums fit the registers"
    columns = 1024 // fmt.bits if fmt.kind == "int" else tactic.block_k
    stage = columns * (2 * tactic.block_m + rows * (fmt.bits or 16) // 8)
    assert stage * tactic.num_stages <= shared_memory(capability) or tactic.num_stages == 2


@pytest.mark.parametrize("fmt", FORMATS[:-1], ids=weight_key)
def test_vectors_of_a_row_fill_the_steps_of_the_default(fmt: WeightFormat) -> None:
    """768 elements are 96, 48 or 24 vectors: no step of 64 lanes ends with them."""
    shape = of_qwen(fmt)
    tactic = default_tactic(shape, 1, HOPPER)
    bits = fmt.bits or 16
    assert tactic.kernel == "gemv"
    assert (fmt.shape[1] * bits // 128) % (tactic.block_k * bits // 128 * tactic.num_stages) == 0


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    shape = of_qwen(FORMATS[0], gated=True)
    found = [default_tactic(shape, tokens, HOPPER) for tokens in (16, 64, 256, 512, 2048)]
    assert [tactic.block_m for tactic in found] == [16, 16, 32, 64, 128]
    assert [tactic.swap for tactic in found] == [True, True, True, False, False]
    of_eight = replace(shape, number=8, top_k=2)
    assert default_tactic(of_eight, 64, HOPPER).block_m == 32


def test_x_is_rounded_where_the_checkpoint_says_so() -> None:
    """A key does not say it."""
    rounded = replace(FORMATS[1], activation="token")
    found = [
        any(tactic.rounds for tactic in candidate_tactics(of_qwen(fmt), 64, HOPPER))
        for fmt in (rounded, FORMATS[1], FORMATS[2])
    ]
    assert found == [True, False, False]
    assert not default_tactic(of_qwen(rounded), 64, HOPPER).rounds
    timed = Tactic("dot", 64, 128, 4, 3, block_m=16, rounds=True)
    table = Tactics(HOPPER, entries={"fp8 2048x768 8/128 64": timed})
    assert find_tactic(table, of_qwen(rounded), 64) == timed
    assert not find_tactic(table, of_qwen(FORMATS[1]), 64).rounds


def test_experts_that_tokens_share_are_read_once() -> None:
    """Four tokens of Mixtral choose five or six of eight experts, and of Qwen 29 of 128."""
    mixtral = ExpertShape(FORMATS[4], True, 8, 2)
    assert [default_tactic(mixtral, tokens, HOPPER).kernel for tokens in (1, 4)] == ["gemv", "dot"]
    assert default_tactic(of_qwen(FORMATS[0], gated=True), 4, HOPPER).kernel == "gemv"


def test_what_must_be_decoded_is_the_left_operand() -> None:
    assert default_tactic(of_qwen(FORMATS[3]), 256, HOPPER).swap
    for tokens, rows, tile in ((512, 64, 64), (1024, 128, 128), (16384, 128, 256)):
        wide = default_tactic(of_qwen(FORMATS[3]), tokens, HOPPER)
        assert (wide.kernel, wide.block_n, wide.block_m) == ("wide", rows, tile)
    assert default_tactic(of_qwen(FORMATS[1]), 2048, HOPPER).swap


def test_a_timed_tactic_serves_its_bucket_and_its_experts() -> None:
    shape = of_qwen(FORMATS[0], gated=True)
    timed = Tactic("dot", 64, 64, 4, 3, block_m=16)
    table = Tactics(HOPPER, entries={"bfloat16 1536x2048 gated 8/128 2048": timed})
    assert find_tactic(table, shape, 600) == find_tactic(table, shape, 8192) == timed
    larger = replace(timed, block_m=128)
    more = Tactics(HOPPER, entries={**table.entries, shape.key(8192): larger})
    assert find_tactic(more, shape, 2049) == find_tactic(more, shape, 20000) == larger
    assert find_tactic(more, shape, 2048) == timed
    assert Tactics.from_json(table.to_json()).entries == table.entries
    assert find_tactic(table, shape, 512) == default_tactic(shape, 512, HOPPER)
    other = replace(shape, number=64)
    assert find_tactic(table, other, 2048) == default_tactic(other, 2048, HOPPER)


MXFP4 = WeightFormat((5760, 2880), "float4_e2m1", "float8_e8m0fnu", 4, 32)


def test_gpt_oss_takes_wider_tiles_the_more_tokens_there_are() -> None:
    """As they ship, and all of them are timed."""
    shipped, shape = Tactics.load(None, HOPPER, ""), ExpertShape(MXFP4, True, 32, 4)
    tiles = [(256, Tile(64, 64)), (2048, Tile(192, 128)), (8192, Tile(128, 256))]
    for tokens, tile in tiles:
        found = find_tactic(shipped, shape, tokens)
        assert found == wide_tactic(tile, gated=True)
        assert found in candidate_tactics(shape, tokens, HOPPER)


def test_two_products_are_on_their_way_where_registers_allow() -> None:
    """The scales and zero points of eight groups a chunk need too many beside 256 sums."""
    many = WeightFormat((1536, 2048), "int", "float16", 4, 32, "zero")
    for fmt, largest in ((MXFP4, True), (FORMATS[3], True), (many, False)):
        assert runs_deep(Tile(128, 128), fmt)
        assert runs_deep(Tile(128, 256), fmt) == largest
        assert runs_deep(Tile(192, 128), fmt) == (fmt is MXFP4)
        assert not any(
            runs_deep(tile, fmt) for tile in (Tile(64, 64), Tile(128, 64), Tile(64, 128))
        )
