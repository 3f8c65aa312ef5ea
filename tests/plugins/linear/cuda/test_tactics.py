"""The choice of a Linear's kernel, and its table as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slipstream.errors import EngineMismatchError
from slipstream.plugins.linear.cuda.candidates import candidate_tactics
from slipstream.plugins.linear.cuda.tactics import (
    BUCKETS,
    DOT_TOKENS,
    GEMV_TOKENS,
    Tactic,
    Tactics,
    block_m,
    default_tactic,
    describe,
    entry_key,
    weight_key,
)
from slipstream.plugins.linear.cuda.wide import Tile
from slipstream.weights.tensor import WeightFormat

HOPPER = (9, 0)
INT4 = WeightFormat((6144, 4096), "int", "float16", 4, 128, "zero")
FORMATS = [
    WeightFormat((4096, 4096), "dense", "bfloat16"),
    INT4,
    WeightFormat((28672, 4096), "int", "float16", 8, 64, "offset"),
    WeightFormat((4096, 14336), "int", "float32", 8, 14336, activation="token"),
    WeightFormat((4096, 4096), "float8_e4m3", "float32", 8, 4096, activation="token"),
    WeightFormat((4096, 4096), "float8_e4m3", "float32", 8, 128, "midpoint", 128, "group"),
    WeightFormat((40, 576), "int", "float16", 4, 32, "midpoint"),
]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), HOPPER, (10, 0)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=weight_key)
def test_tactics_are_ones_that_the_kernels_take(
    fmt: WeightFormat, gated: bool, capability: tuple[int, int]
) -> None:
    for tokens in (*BUCKETS, 3, 57, 257, 8192):
        found = candidate_tactics(fmt, gated, tokens, capability)
        assert found[0] == default_tactic(fmt, gated, tokens, capability)
        assert len(set(found)) == len(found) and Tactic("blas") in found
        for tactic in found:
            assert tactic.kernel != "gemv" or tokens <= GEMV_TOKENS
            if tactic.kernel == "dot":
                assert tokens <= DOT_TOKENS and not (tactic.fuse_norm and tactic.split_k > 1)
                assert fmt.rows == 1 or 128 % tactic.block_k == 0


def test_x_is_rounded_only_where_the_format_says_so() -> None:
    fmt = FORMATS[4]
    rounding = Tactic("dot", 64, 128, num_stages=6, block_m=64, rounds=True)
    table = Tactics(HOPPER, "", {entry_key(fmt, False, 64): rounding})
    assert table.find(fmt, False, 50) == rounding
    exact = replace(fmt, activation="none")
    assert entry_key(exact, False, 64) == entry_key(fmt, False, 64)
    assert not table.find(exact, False, 50).rounds
    for tokens in BUCKETS:
        assert not any(t.rounds for t in candidate_tactics(exact, False, tokens, HOPPER))
        assert any(t.rounds for t in candidate_tactics(fmt, False, tokens, HOPPER)) == (
            1 < tokens <= DOT_TOKENS
        )
        assert not any(t.rounds for t in candidate_tactics(fmt, False, tokens, (8, 9)))


def test_odd_rows_go_to_the_library() -> None:
    odd = WeightFormat((40, 570), "float8_e4m3", "float32", 8, 570, activation="token")
    assert candidate_tactics(odd, False, 1, HOPPER) == [Tactic("blas")]


def test_tokens_of_a_tile() -> None:
    assert [block_m(t) for t in (1, 16, 17, 33, 64, 65, 256)] == [16, 16, 32, 64, 64, 128, 128]


def test_a_timed_tactic_serves_its_bucket() -> None:
    table = Tactics(HOPPER)
    timed = Tactic("dot", 32, 128, 4, 3)
    table.entries[entry_key(INT4, False, 8)] = timed
    assert table.find(INT4, False, 5) == table.find(INT4, False, 8) == timed
    assert table.find(INT4, False, 9) == default_tactic(INT4, False, 9, HOPPER)
    assert table.find(INT4, True, 8) == default_tactic(INT4, True, 8, HOPPER)
    assert table.find(INT4, False, 2049) == Tactic("blas")


def test_integers_of_many_tokens_are_wide_on_hopper() -> None:
    """Where no chunk of K is cut; another GPU, format or K has the kernels that it had."""
    cut = replace(INT4, shape=(6144, 4096 + 128))
    for tokens in (64, 200, 2048):
        assert default_tactic(INT4, False, tokens, HOPPER).kernel == "wide"
        for fmt, capability in ((INT4, (10, 0)), (cut, HOPPER), (FORMATS[0], HOPPER)):
            kernels = {t.kernel for t in candidate_tactics(fmt, False, tokens, capability)}
            assert "wide" not in kernels and "blas" in kernels


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336), (200, 1024), (64, 256)])
def test_a_wide_fits_an_sm(shape: tuple[int, int], gated: bool) -> None:
    """With as many others as its registers leave room for, and a counter for every 64 rows."""
    fmt = replace(INT4, shape=shape)
    for tokens in (64, 128, 256, 512, 1024, 2048):
        found = [t for t in candidate_tactics(fmt, gated, tokens, HOPPER) if t.kernel == "wide"]
        assert found
        for tactic in found:
            tile = Tile(tactic.block_n * (2 if gated else 1), tactic.block_m, tactic.split_k)
            shared = tactic.num_stages * tile.tokens * 128
            assert tactic.num_stages >= 3
            assert (shared + 2048) * tile.programs <= 228 << 10
            assert tile.registers * 128 * (tile.rows // 64 + 1) * tile.programs <= 1 << 16
            if tile.split > 1:
                tiles = -(-shape[0] // tile.rows) * -(-tokens // tile.tokens)
                assert tiles * tile.rows // 64 <= 2 * -(-shape[0] // 16)


def test_json_round_trip(tmp_path: Path) -> None:
    table = Tactics(HOPPER, "NVIDIA H100")
    table.entries[entry_key(INT4, True, 4)] = Tactic("gemv", 8, 1024, 8, 2, True)
    assert Tactics.from_json(table.to_json()) == table
    file = tmp_path / "tactics.json"
    file.write_text(table.to_json())
    key = entry_key(INT4, True, 4)
    shipped = Tactics.load(None, HOPPER, "NVIDIA H100")
    assert Tactics.load(file, HOPPER, "NVIDIA H100").entries == {**shipped.entries, **table.entries}
    assert Tactics.load(file, HOPPER, "NVIDIA H200") == replace(shipped, device="NVIDIA H200")
    assert not Tactics.load(file, (8, 0), "NVIDIA A100").entries
    assert key not in Tactics.load(tmp_path / "none.json", HOPPER, "NVIDIA H100").entries


def test_a_table_ships_for_hopper() -> None:
    """The shapes of an 8B Llama in its usual formats, at every bucket that was timed."""
    shipped = Tactics.load(None, HOPPER, "NVIDIA H100")
    for fmt in (
        WeightFormat((28672, 4096), "dense", "bfloat16"),
        WeightFormat((28672, 4096), "float8_e4m3", "float32", 8, 4096, activation="token"),
        WeightFormat((28672, 4096), "int", "float16", 4, 128, "midpoint"),
    ):
        for tokens in (1, 16, 64):
            assert entry_key(fmt, True, tokens) in shipped.entries


@pytest.mark.parametrize("place", ["table", "entry"])
def test_unknown_fields_are_refused(place: str) -> None:
    table = Tactics(HOPPER)
    table.entries[entry_key(INT4, False, 1)] = Tactic("blas")
    data = json.loads(table.to_json())
    (data if place == "table" else next(iter(data["entries"].values())))["colour"] = "red"
    with pytest.raises(EngineMismatchError, match="unknown fields colour"):
        Tactics.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "[" * 200_000, '{"device": "x"}'])
def test_broken_text_is_refused(text: str) -> None:
    with pytest.raises(EngineMismatchError, match=r"tactics\.json cannot be used"):
        Tactics.from_json(text)


def test_unknown_kernels_are_refused() -> None:
    table = Tactics(HOPPER)
    table.entries[entry_key(INT4, False, 1)] = Tactic("blas")
    with pytest.raises(EngineMismatchError, match="no kernel 'magic'"):
        Tactics.from_json(table.to_json().replace('"blas"', '"magic"'))


def test_keys_name_a_format() -> None:
    assert [weight_key(fmt) for fmt in FORMATS] == [
        "bfloat16", "int4g128z", "int8g64o", "int8row", "fp8", "fp8block", "int4g32m",
    ]  # fmt: skip


def test_kernels_are_described() -> None:
    odd = WeightFormat((40, 570), "float8_e4m3", "float32", 8, 570, activation="token")
    assert [describe(fmt) for fmt in (*FORMATS[:2], FORMATS[3], FORMATS[4], odd)] == [
        "bfloat16: GEMV, dot, cuBLAS",
        "int4g128z: GEMV, dot, wide on sm_90, dense fallback (dequantize, cuBLAS)",
        "int8row: GEMV, dot, wide on sm_90, cuBLASLt int8",
        "fp8: GEMV, dot, cuBLASLt float8",
        "fp8: dense fallback (dequantize, cuBLAS)",
    ]
