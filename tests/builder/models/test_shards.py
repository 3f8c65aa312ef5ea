"""The parts that ranks have of a weight are the weight, in every format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.quantized_models import (
    MemoryCheckpoint,
    Scheme,
    dense,
    float4,
    float8,
    integers,
    nf4,
    quantized_llama,
    with_input,
)

from slipstream.builder.models import architecture_of
from slipstream.builder.models.shards import Shards
from slipstream.errors import BuildError

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24}
LAYER = "model.layers.0."
SCHEMES: dict[str, Scheme] = {
    "dense": dense,
    "int4 groups": integers(4, 128, "zero"),
    "int4 offsets": integers(4, 32, "offset"),
    "int8 rows": integers(8, activation="static"),
    "float8 blocks": float8(128, 128),
    "float8 tensors": float8(320, 0),
    "nvfp4": float4,
    "nf4": nf4,
    "pre-scale": with_input(integers(8, 64), scale=3),
}


def shards(checkpoint: MemoryCheckpoint, ranks: int) -> list[Shards]:
    config = checkpoint.config
    architecture = architecture_of(config.architecture)
    return [Shards(architecture, config, checkpoint.tensor, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", SCHEMES)
def test_parts_are_the_whole(name: str, ranks: int) -> None:
    """Side by side along their axis, number for number, and in one format."""
    checkpoint = quantized_llama({"proj": SCHEMES[name], "embed": SCHEMES[name]}, **SHAPE)
    own = shards(checkpoint, ranks)
    for module, axis in (("mlp.up_proj", 0), ("self_attn.q_proj", 0), ("mlp.down_proj", 1)):
        tensor = f"{LAYER}{module}.weight"
        parts = [each.tensor(tensor) for each in own]
        assert len({part.format for part in parts}) == 1
        loaded = [part.load() for part in parts]
        assert all(a.format == b.format for a, b in zip(parts, loaded, strict=True))
        whole = checkpoint.tensor(tensor).load().dequantize()
        made = np.concatenate([part.dequantize() for part in loaded], axis)
        np.testing.assert_array_equal(made, whole)


def test_columns_in_an_order_of_their_own_are_picked_from_those_of_all_ranks() -> None:
    """And scaled where they are picked."""
    scheme = with_input(integers(4, 64, "zero"), order=3, scale=1)
    checkpoint, name = quantized_llama({"proj": scheme}, **SHAPE), f"{LAYER}self_attn.o_proj"
    whole = checkpoint.tensor(f"{name}.weight").load().dequantize()
    x = np.random.default_rng(0).normal(0, 1, (3, whole.shape[1])).astype(np.float32)
    total = np.zeros((3, whole.shape[0]))
    for each in shards(checkpoint, 4):
        order = each.order(name)
        assert order is not None and each.order(f"{LAYER}self_attn.q_proj") is None
        total += x[:, order] @ each.tensor(f"{name}.weight").load().dequantize().T
    np.testing.assert_allclose(total, x @ whole.T, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "dealt"),
    [
        (8, 4, 2, [[0, 1], [2, 3]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (12, 6, 4, [[0, 0, 1], [1, 2, 2], [3, 3, 4], [4, 5, 5]]),
        (8, 1, 8, [[0]] * 8),
    ],
)
def test_heads_of_keys_go_with_the_queries_that_read_them(
    heads: int, kv_heads: int, ranks: int, dealt: list[list[int]]
) -> None:
    shape: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    checkpoint = quantized_llama({}, **shape, head_dim=8)
    name = f"{LAYER}self_attn.k_proj.weight"
    rows = checkpoint.tensor(name).load().dequantize().reshape(kv_heads, 8, -1)
    for each, wanted in zip(shards(checkpoint, ranks), dealt, strict=True):
        assert (each.config.num_heads, each.config.num_kv_heads) == (heads // ranks, len(wanted))
        made = each.tensor(name).load().dequantize().reshape(len(wanted), 8, -1)
        np.testing.assert_array_equal(made, rows[wanted])


def test_a_bias_that_is_added_up_is_the_first_ranks() -> None:
    checkpoint = quantized_llama({}, **SHAPE)
    bias = checkpoint.tensor("model.norm.weight")
    first, second = (each.of(f"{LAYER}mlp.down_proj.bias", bias) for each in shards(checkpoint, 2))
    assert first.load().dequantize().any() and not second.load().dequantize().any()


def test_a_vocabulary_ends_in_rows_that_nobody_reads() -> None:
    checkpoint = quantized_llama({}, **SHAPE, vocab_size=321)
    first, second = shards(checkpoint, 2)
    assert (first.vocabulary, second.first_token) == (161, 161)
    rows = second.tensor("lm_head.weight").load().dequantize()
    whole = checkpoint.tensor("lm_head.weight").load().dequantize()
    np.testing.assert_array_equal(rows, whole[[*range(161, 321), 320]])


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    checkpoint = quantized_llama({}, **SHAPE)
    config = replace(checkpoint.config, num_heads=6, num_kv_heads=3)
    refused = Shards(architecture_of(config.architecture), config, checkpoint.tensor, 0, 4)
    with pytest.raises(BuildError, match="6 heads of attention cannot be shared by 4 ranks alike"):
        _ = refused.config
