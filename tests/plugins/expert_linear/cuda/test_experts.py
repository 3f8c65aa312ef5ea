"""The CUDA kernels of ExpertLinear against its NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.plugins.linear.weights import random_weight

from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.expert_linear import reference
from slipstream.plugins.expert_linear.cuda.experts import Experts, expert_linear, group
from slipstream.plugins.expert_linear.cuda.tactics import TILES, default_tactic
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.linear.cuda.packing import pack
from slipstream.plugins.linear.cuda.tactics import Tactic, wide_tactic
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.linear.cuda.wide import Tile
from slipstream.weights.tensor import WeightFormat

pytestmark = pytest.mark.kernel

Floats = NDArray[np.float32]
EXPERTS, TOP_K, N, K = 5, 2, 48, 96
ROWS = EXPERTS * N
FORMATS = {
    "bf16": WeightFormat((ROWS, K), "dense", "bfloat16"),
    "fp8": WeightFormat((ROWS, K), "float8_e4m3", "float32", 8, K),
    "fp8token": WeightFormat((ROWS, K), "float8_e4m3", "float32", 8, K, activation="token"),
    "fp8static": WeightFormat((ROWS, K), "float8_e4m3", "float32", 8, K, activation="static"),
    "fp8block": WeightFormat((EXPERTS * 256, 160), "float8_e4m3", "float32", 8, 128, rows=128),
    "int4g32z": WeightFormat((ROWS, K), "int", "float16", 4, 32, "zero"),
    "int4g32o": WeightFormat((ROWS, K), "int", "float16", 4, 32, "offset"),
    "int4g64z": WeightFormat((ROWS, 256), "int", "float16", 4, 64, "zero"),
    "int4g32m": WeightFormat((ROWS, 64), "int", "float16", 4, 32, "midpoint"),
    "int4g128m": WeightFormat((ROWS, 512), "int", "float16", 4, 128, "midpoint"),
    "int8g32m": WeightFormat((ROWS, K), "int", "float16", 8, 32, "midpoint"),
    "int8row": WeightFormat((ROWS, K), "int", "float32", 8, K, "midpoint"),
}
# Of wide: whole chunks of words but for float4, and an N that no tile divides.
WIDE = {
    "wide mxfp4": WeightFormat((EXPERTS * 176, 352), "float4_e2m1", "float8_e8m0fnu", 4, 32),
    "wide int4g128m": WeightFormat((EXPERTS * 176, 512), "int", "float16", 4, 128, "midpoint"),
    "wide int4g32z": WeightFormat((EXPERTS * 176, 256), "int", "float16", 4, 32, "zero"),
    "wide int8g64o": WeightFormat((EXPERTS * 176, 384), "int", "float32", 8, 64, "offset"),
    "wide int8row": WeightFormat((EXPERTS * 176, 256), "int", "float32", 8, 256, "midpoint"),
}
MXFP4 = WeightFormat((EXPERTS * 16, K), "float4_e2m1", "float8_e8m0fnu", 4, 32)
TOKENS = (1, 21) if interpreting() else (1, 2, 21)
# In the interpreter a GEMV of this many rows takes half a minute.
CASES = [
    (name, tokens)
    for name in FORMATS
    for tokens in TOKENS
    if name not in ("fp8token", "fp8static")
    and not (interpreting() and name in ("int4g64z", "int4g32m", "int4g128m") and tokens == 1)
    and not (interpreting() and name == "fp8block" and tokens == 1)
]


def choices(tokens: int, top_k: int = TOP_K) -> NDArray[np.int32]:
    """Different experts for each token; nobody chooses the last."""
    rng = np.random.default_rng(tokens)
    return np.array([rng.permutation(EXPERTS - 1)[:top_k] for _ in range(tokens)], np.int32)


def run(
    name: str,
    tokens: int,
    device: str,
    tactic: Tactic | None = None,
    dtype: torch.dtype = torch.bfloat16,
    top_k: int = TOP_K,
    **options: Any,  # noqa: ANN401
) -> tuple[Floats, Floats]:
    """What the kernels give, by default those that nobody timed, and what the reference does."""
    weight, reduce = (
        random_weight({**FORMATS, **WIDE}.get(name, MXFP4)),
        options.get("reduce", False),
    )
    rng = np.random.default_rng(1)
    n, k = weight.format.shape[0] // EXPERTS, weight.format.shape[1]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)).to(dtype).to(device)

    x, bias = tensor(tokens * (top_k if reduce else 1), k), tensor(EXPERTS * n)
    residual = tensor(tokens, n) if reduce else None
    factors = rng.uniform(0, 1, (tokens, top_k)).astype(np.float32) if reduce else None
    ids = choices(tokens, top_k)
    packed = DeviceWeight.from_blob(torch.from_numpy(pack(weight)).to(device), weight.format)
    experts = Experts(packed, EXPERTS, bias, **options)
    got = expert_linear(
        x,
        experts,
        torch.from_numpy(ids).to(device),
        None if factors is None else torch.from_numpy(factors).to(device),
        residual,
        tactic=tactic or default_tactic(experts.shape(top_k), tokens, (9, 0)),
    )
    want = reference.expert_linear(
        exact(x), weight, ids, factors, bias=exact(bias), experts=EXPERTS,
        residual=None if residual is None else exact(residual), **options,
        activation=weight.format.activation if tactic is not None and tactic.rounds else "none",
    )  # fmt: skip
    return exact(got), want


def exact(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.float().cpu().numpy())


def assert_close(got: Floats, want: Floats) -> None:
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 * float(np.abs(want).max()))


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_a_product_with_every_expert_of_a_token(name: str, tokens: int, device: str) -> None:
    gate = (None, *GATES.values())[(list(FORMATS).index(name) + tokens) % (1 + len(GATES))]
    options: dict[str, Any] = {} if gate is None else {"gated": True, "gate": gate}
    assert_close(*run(name, tokens, device, **options))


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_a_sum_over_the_experts_of_a_token(name: str, tokens: int, device: str) -> None:
    assert_close(*run(name, tokens, device, reduce=True))


@pytest.mark.parametrize("name", ["fp8", "int4g32z"])
def test_a_sum_over_experts_that_are_no_power_of_two(name: str, device: str) -> None:
    assert_close(*run(name, 1, device, top_k=3, reduce=True))


# Each with one format: the sizes of tiles, either operand on the left, few and many stages.
TACTICS = {
    "bf16": Tactic("dot", 16, 32, block_m=16),
    "fp8": Tactic("dot", 64, 64, 8, 3, swap=True, block_m=64),
    "fp8block": Tactic("dot", 32, 128, swap=True, block_m=128),
    "int4g32z": Tactic("dot", 32, 256, swap=True, block_m=32),
    "int8row": Tactic("dot", 64, 128, 8, 2, block_m=64),
}


@pytest.mark.parametrize("name", TACTICS)
def test_tiles_of_every_size(name: str, device: str) -> None:
    options: dict[str, Any] = {"gated": True, "gate": GATES["silu"]}
    if name in ("fp8", "int4g32z"):
        options = {"reduce": True}
    assert_close(*run(name, 21, device, TACTICS[name], **options))


@pytest.mark.parametrize("name", ["bf16", "mxfp4"])
def test_tiles_of_one_token(name: str, device: str) -> None:
    """Its pairs need no grouping."""
    opening = Tactic("dot", 16, 32, block_m=16)
    assert_close(*run(name, 1, device, opening, gated=True, gate=GATES["silu"]))
    closing = Tactic("dot", 64, 32, swap=True, block_m=16)
    assert_close(*run(name, 1, device, closing, reduce=True))


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("name", ["int4g128m", "mxfp4"])
def test_gates_beside_their_ups(name: str, tokens: int, device: str) -> None:
    tactic = Tactic("dot", 32, 256, swap=True, block_m=16)
    assert_close(*run(name, tokens, device, tactic, gated=True, gate=GATES["clamped"]))


@pytest.mark.parametrize("name", ["fp8token", "fp8static"])
def test_rounded_rows(name: str, device: str) -> None:
    """x in float8, with a scale a token or the weight's own."""
    opening = Tactic("dot", 64, 128, 4, 3, swap=True, block_m=16, rounds=True)
    assert_close(*run(name, 9, device, opening, gated=True, gate=GATES["silu"]))
    closing = Tactic("dot", 32, 128, 4, 2, block_m=32, rounds=True)
    assert_close(*run(name, 21, device, closing, reduce=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16"])
def test_a_sum_is_the_same_whichever_product_is_the_last(name: str, device: str) -> None:
    tactic = Tactic("gemv", 8, 64 if name == "bf16" else 256, 2)
    got, want = run(name, 6, device, tactic, reduce=True)
    assert_close(got, want)
    np.testing.assert_array_equal(run(name, 6, device, tactic, reduce=True)[0], got)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [(1, {"gated": True, "gate": GATES["clamped"]}), (5, {"reduce": True})],
    ids=["gemv", "dot"],
)
def test_mxfp4(tokens: int, options: dict[str, Any], device: str) -> None:
    assert_close(*run("mxfp4", tokens, device, **options))


# Triton's interpreter does not know Gluon.
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


@hopper
@pytest.mark.parametrize("tokens", [3, 70, 700])
@pytest.mark.parametrize("name", WIDE)
def test_wide(name: str, tokens: int, device: str) -> None:
    """Each format with every tile, gates in turn, and summed up."""
    tiles = [(128, 256), (128, 128), (64, 128), (128, 64), (64, 64), (128, 32), (64, 32)]
    for at, (rows, size) in enumerate([*tiles, (192, 128), (192, 64)]):
        gate = (None, *GATES.values())[(list(WIDE).index(name) + at) % (1 + len(GATES))]
        options: dict[str, Any] = {"reduce": True}
        if gate is not None:
            options = {"gated": True, "gate": gate}
        dtype = torch.float16 if at == 1 else torch.bfloat16
        tactic = wide_tactic(Tile(rows, size), gate is not None)
        assert_close(*run(name, tokens, device, tactic, dtype, **options))


@hopper
def test_a_row_of_wide_does_not_feel_the_others(device: str) -> None:
    """Neither what they are, nor which experts they choose."""
    rng = np.random.default_rng(3)
    fmt, tokens = WIDE["wide mxfp4"], 200
    blob = torch.from_numpy(pack(random_weight(fmt))).to(device)
    experts = Experts(DeviceWeight.from_blob(blob, fmt), EXPERTS, gated=True, gate=GATES["clamped"])
    x = torch.from_numpy(rng.normal(0, 1, (tokens, 352)).astype(np.float32)).to(device)
    x, ids = x.to(torch.bfloat16), torch.from_numpy(choices(tokens)).to(device)
    for tile in (Tile(128, 128), Tile(64, 64)):
        tactic = wide_tactic(tile, gated=True)
        whole = expert_linear(x, experts, ids, tactic=tactic)
        assert torch.equal(expert_linear(x, experts, ids, tactic=tactic), whole), "twice the same"
        others, elsewhere = x.clone(), ids.flip(0).contiguous()
        others[1:] = torch.nan
        elsewhere[0] = ids[0]
        alone = expert_linear(others, experts, elsewhere, tactic=tactic)
        assert torch.equal(alone[:TOP_K], whole[:TOP_K])


@pytest.mark.parametrize("block", TILES)
def test_pairs_are_grouped_by_expert_in_their_order(block: int, device: str) -> None:
    ids = np.random.default_rng(0).integers(0, 7, (300, 2)).astype(np.int32)
    ids[ids == 4] = 5  # an expert that nobody chooses
    order, bounds, tiles, length = group(torch.from_numpy(ids).to(device), 8).of(block)
    flat = ids.reshape(-1)
    np.testing.assert_array_equal(order.cpu(), np.argsort(flat, kind="stable"))
    counts = np.bincount(flat, minlength=8)
    np.testing.assert_array_equal(bounds.cpu(), [0, *np.cumsum(counts)])
    of_each = -(-counts // block)
    total = int(tiles[0])
    assert total == of_each.sum() <= length
    experts, firsts = tiles[4 : 4 + total].cpu(), tiles[4 + length : 4 + length + total].cpu()
    np.testing.assert_array_equal(experts, np.repeat(np.arange(8), of_each))
    np.testing.assert_array_equal(firsts, np.repeat(np.cumsum(of_each) - of_each, of_each))
