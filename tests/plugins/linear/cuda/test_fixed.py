"""The tactics of the deterministic mode, and that they keep its promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.plugins.linear.weights import random_weight

from slipstream.errors import EngineMismatchError
from slipstream.plugins.expert_linear.cuda.tactics import ExpertShape, find_tactic
from slipstream.plugins.linear import reference
from slipstream.plugins.linear.cuda.fixed import FixedTactics, fixed_tactic
from slipstream.plugins.linear.cuda.linear import linear
from slipstream.plugins.linear.cuda.packing import in_words, pack
from slipstream.plugins.linear.cuda.tactics import Tactic, block_m, weight_key
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.weights.tensor import Activation, QuantTensor, WeightFormat

HOPPER = (9, 0)
TOKENS = (1, 2, 16, 17, 33, 64, 65, 128, 256, 257, 2048, 8192)


def formats(n: int, k: int) -> list[WeightFormat]:
    return [
        WeightFormat((n, k), "dense", "bfloat16"),
        WeightFormat((n, k), "float8_e4m3", "float32", 8, k, activation="token"),
        WeightFormat((n, k), "float8_e4m3", "float32", 8, 128, "midpoint", 128, "group"),
        WeightFormat((n, k), "int", "float16", 4, 64, "zero"),
        WeightFormat((n, k), "int", "float32", 8, k, "midpoint", activation="token"),
        WeightFormat((n, k), "float4_e2m1", "float8_e8m0fnu", 4, 32),
    ]


def parts(fmt: WeightFormat, tactic: Tactic) -> list[int]:
    """Where the sums of the parts of K begin."""
    step = 1024 // fmt.bits if in_words(fmt) else tactic.block_k
    steps = -(-fmt.shape[1] // step)
    return [i * -(-steps // tactic.split_k) * step for i in range(tactic.split_k)]


@pytest.mark.parametrize("capability", [(8, 0), HOPPER, (10, 0), (12, 0)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(4096, 14336), (6144, 4096), (960, 576), (1536, 1152)])
def test_what_decides_bits_follows_from_the_weight(
    shape: tuple[int, int], gated: bool, capability: tuple[int, int]
) -> None:
    table = FixedTactics(capability)
    for fmt in formats(*shape):
        found = [table.find(fmt, gated, tokens) for tokens in TOKENS]
        assert {(t.kernel, t.swap, t.rounds, t.fuse_norm) for t in found} == {
            ("dot", capability[0] in (9, 10), found[0].rounds, False)
        }
        assert len({tuple(parts(fmt, tactic)) for tactic in found}) == 1, weight_key(fmt)
        assert fmt.rows == 1 or {tactic.block_k for tactic in found} == {128}
        for tokens, tactic in zip(TOKENS, found, strict=True):
            # Where programs share a tile, each has a counter.
            tiles = -(-shape[0] // tactic.block_n) * -(-tokens // block_m(tokens))
            assert tactic.split_k == 1 or tactic.serial or tiles <= 2 * -(-shape[0] // 16)


def test_experts_multiply_in_tiles_alone_that_tokens_decide() -> None:
    for fmt in formats(1536, 2048):
        shape = ExpertShape(fmt, True, 128, 8)
        found = [find_tactic(FixedTactics(HOPPER), shape, tokens) for tokens in TOKENS]
        assert {(t.kernel, t.swap, t.split_k) for t in found} == {("dot", True, 1)}
        assert len({t.block_m for t in found}) > 1
        assert fmt.rows == 1 or {t.block_k for t in found} == {128}


def test_rows_of_no_whole_vectors_are_refused() -> None:
    odd = WeightFormat((40, 570), "dense", "bfloat16")
    with pytest.raises(EngineMismatchError, match="570 elements; run without --deterministic"):
        FixedTactics(HOPPER).find(odd, False, 1)


@pytest.mark.kernel
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fmt", formats(128, 512), ids=weight_key)
def test_parts_of_k_are_added_up_alike_by_one_program_and_by_several(
    fmt: WeightFormat, gated: bool, device: str
) -> None:
    weight, on_device = made(fmt, device)
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    tactic = replace(fixed_tactic(fmt, gated, 70, HOPPER), block_n=64, split_k=2, num_stages=2)
    together, serial = (
        linear(x.to(device), on_device, gated=gated, tactic=replace(tactic, serial=serial))
        for serial in (False, True)
    )
    assert torch.equal(together, serial)
    activation: Activation = "token" if tactic.rounds else "none"
    want = reference.linear(x.float().numpy(), weight, activation=activation, gated=gated)
    error = np.abs(together.float().cpu().numpy() - want).max() / np.abs(want).max()
    assert error < 0.02


@pytest.mark.kernel
def test_every_tile_of_many_tokens_is_computed(device: str) -> None:
    fmt = WeightFormat((200, 64), "dense", "bfloat16")
    weight, on_device = made(fmt, device)
    x = torch.randn(1200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = linear(x.to(device), on_device, tactic=fixed_tactic(fmt, False, 1200, HOPPER))
    want = reference.linear(weight=weight, activation="none", x=x.float().numpy())
    np.testing.assert_allclose(got.float().cpu().numpy(), want, atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fmt", formats(6144, 4096), ids=weight_key)
def test_a_row_is_the_same_bits_among_any_number(fmt: WeightFormat, gated: bool) -> None:
    _, weight = made(fmt, "cuda")
    table = FixedTactics(torch.cuda.get_device_capability())
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    width = 3072 if gated else 6144
    residual = torch.randn(4096, width, device="cuda").bfloat16()
    norm = torch.rand(4096, device="cuda").bfloat16()

    def rows(tokens: int) -> torch.Tensor:
        return linear(
            x[:tokens].contiguous(),
            weight,
            residual=residual[:tokens].contiguous(),
            norm_weight=norm,
            norm_eps=1e-5,
            gated=gated,
            tactic=table.find(fmt, gated, tokens),
        )

    whole = rows(4096)
    for tokens in (*TOKENS[:-1], 777):
        assert torch.equal(rows(tokens), whole[:tokens]), tokens


def made(fmt: WeightFormat, device: str) -> tuple[QuantTensor, DeviceWeight]:
    weight = random_weight(fmt, 0)
    blob = torch.from_numpy(pack(weight)).to(device)
    return weight, DeviceWeight.from_blob(blob, fmt)
