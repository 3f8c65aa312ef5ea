"""The C++ kernel of ExpertLinear against its NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.plugins.linear.weights import random_weight

from slipstream.builder.targets.cpu.experts import expert_attributes, pack_experts
from slipstream.plugins import native
from slipstream.plugins.expert_linear import SPEC, reference
from slipstream.plugins.gated_mlp import GATES
from slipstream.weights.tensor import Activation, QuantTensor, WeightFormat

Floats = NDArray[np.float32]
EXPERTS, TOP_K, N, K = 5, 3, 50, 96
FORMATS = {
    "float32": WeightFormat((EXPERTS * N, K), "dense", "float32"),
    "float16": WeightFormat((EXPERTS * N, K), "dense", "float16"),
    "bfloat16": WeightFormat((EXPERTS * N, K), "dense", "bfloat16"),
    "int4": WeightFormat((EXPERTS * N, K), "int", "float16", 4, 32, "zero"),
    "int4 offsets": WeightFormat((EXPERTS * N, K), "int", "float16", 4, 32, "offset"),
    "int8": WeightFormat((EXPERTS * N, K), "int", "float32", 8, 32, "midpoint"),
    "float4": WeightFormat((EXPERTS * N, K), "float4_e2m1", "float8_e8m0fnu", 4, 32),
    "int8 in halves": WeightFormat((EXPERTS * N, K), "int", "float32", 8, 16, "midpoint"),
}
TOKENS = (1, 2, 7, 40)


def normal(*shape: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def choices(tokens: int, experts: int = EXPERTS) -> NDArray[np.int32]:
    """Different experts for each token; nobody chooses the last."""
    rng = np.random.default_rng(tokens)
    rows = [rng.permutation(experts - 1)[:TOP_K] for _ in range(tokens)]
    return np.array(rows, np.int32).reshape(tokens, TOP_K)


def call(weight: QuantTensor, isa: str, *, threads: int = 2, **values: Any) -> Floats:  # noqa: ANN401
    """``reference.expert_linear`` by the kernel of one instruction set."""
    gated = bool(values.get("gated", 0))
    shape = {"in_features": K, "out_features": N, "experts": EXPERTS, "top_k": TOP_K}
    blob = pack_experts(weight, EXPERTS, gated=gated)
    attributes = expert_attributes(weight.format)
    (y,) = native.call(SPEC, {"weight": blob, **shape, **attributes, **values}, isa, threads)
    return y


def expected(weight: QuantTensor, **values: Any) -> Floats:  # noqa: ANN401
    rounding: Activation = "none" if weight.format.kind == "dense" else "block"
    return reference.expert_linear(weight=weight, experts=EXPERTS, activation=rounding, **values)


def assert_close(got: Floats, want: Floats) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(float(np.abs(want).max()), 1e-6))


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_with_every_expert_of_a_token(isa: str, name: str, gate: str | None) -> None:
    weight = random_weight(FORMATS[name])
    for tokens in TOKENS:
        values: dict[str, Any] = {
            "x": normal(tokens, K),
            "expert_ids": choices(tokens),
            "bias": normal(EXPERTS * N) if tokens != 2 else None,
            "gated": int(gate is not None),
            "gate": GATES[gate or "silu"],
        }
        assert_close(call(weight, isa, **values), expected(weight, **values))


@pytest.mark.parametrize("name", FORMATS)
def test_a_sum_over_the_experts_of_a_token(isa: str, name: str) -> None:
    weight = random_weight(FORMATS[name])
    for tokens in TOKENS:
        values: dict[str, Any] = {
            "x": normal(tokens * TOP_K, K),
            "expert_ids": choices(tokens),
            "expert_weights": np.abs(normal(tokens, TOP_K, seed=4)),
            "bias": normal(EXPERTS * N) if tokens != 2 else None,
            "residual": normal(tokens, N, seed=3) if tokens != 7 else None,
            "reduce": 1,
        }
        assert_close(call(weight, isa, **values), expected(weight, **values))


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_the_experts_of_others(isa: str, name: str) -> None:
    weight, tokens = random_weight(FORMATS[name]), 64
    values: dict[str, Any] = {
        "x": normal(tokens * TOP_K, K),
        "expert_ids": choices(tokens),
        "expert_weights": np.abs(normal(tokens, TOP_K, seed=4)),
        "reduce": 1,
    }
    together = call(weight, isa, **values)
    np.testing.assert_array_equal(together, call(weight, isa, threads=1, **values))
    for token in (0, 17, 63):
        rows = slice(token * TOP_K, (token + 1) * TOP_K)
        alone = {
            **values,
            "x": values["x"][rows],
            "expert_ids": values["expert_ids"][token : token + 1],
            "expert_weights": values["expert_weights"][token : token + 1],
        }
        np.testing.assert_array_equal(call(weight, isa, **alone), together[token : token + 1])


def test_nothing_is_nothing(isa: str) -> None:
    weight = random_weight(FORMATS["int4"])
    y = call(weight, isa, x=normal(0, K), expert_ids=choices(0))
    assert y.shape == (0, N)
