"""The kernel of DrawTokens against its reference, transformers' warpers and itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.runtime.sampling.rows import random_logits

from slipstream.plugins import library, native
from slipstream.plugins.draw_tokens import SPEC
from slipstream.plugins.draw_tokens.reference import MOST_SORTED, draw_tokens
from slipstream.runtime.sampling.params import SamplingParams

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
ALL = {"row": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
TYPES = {name.name: np.dtype(name.dtypes[0]) for name in SPEC.inputs}
# How far float32 weights move the edge between two tokens, in units of 2^-53.
NEAR = int(1e-5 * 2**53)


def draws(uniforms: Ints, **asked: float) -> dict[str, NDArray[Any]]:
    """Inputs of one draw a uniform number, all alike."""
    each = {**ALL, **asked}
    inputs: dict[str, NDArray[Any]] = {
        name: np.full(len(uniforms), value, TYPES[name]) for name, value in each.items()
    }
    return {**inputs, "uniform": uniforms}


def evenly(points: int) -> Ints:
    return ((np.arange(points) + 0.5) / points * 2.0**53).astype(np.int64)


def tokens_of(logits: Floats, isa: str, uniforms: Ints, **asked: float) -> list[int]:
    inputs = {"logits": logits[None], **draws(uniforms, **asked)}
    tokens: list[int] = native.call(SPEC, inputs, isa)[0].tolist()
    return tokens


def warped_probabilities(logits: Floats, params: SamplingParams) -> NDArray[np.float64]:
    """What transformers' warpers make of the logits."""
    chain: list[Any] = [transformers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k > 0:
        chain.append(transformers.TopKLogitsWarper(min(params.top_k, len(logits))))
    if params.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(transformers.MinPLogitsWarper(params.min_p))
    # In float64, because a boundary decided by float32 rounding would be no truth.
    scores = torch.from_numpy(logits).double()[None]
    for warper in chain:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    probabilities: NDArray[np.float64] = torch.softmax(scores, dim=-1)[0].numpy()
    return probabilities


WARPERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 1},
    {"top_k": 5, "temperature": 0.9},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.9, "temperature": 1.5},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"min_p": 0.3, "temperature": 2.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 30, "min_p": 0.1},
    {"top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


class TestDistribution:
    @pytest.mark.parametrize("arguments", WARPERS, ids=str)
    @pytest.mark.parametrize(
        ("size", "points", "scale"), [(50, 2000, 2.0), (1500, 2000, 2.0), (50_001, 100, 0.2),
                                      (50_001, 100, 4.0)]
    )  # fmt: skip
    def test_equals_transformers(
        self, arguments: dict[str, Any], size: int, points: int, scale: float
    ) -> None:
        params = SamplingParams(**arguments)
        logits = random_logits(size, seed=size, scale=scale)
        expected = warped_probabilities(logits, params)
        tokens = tokens_of(logits, library.isas()[0], evenly(points), **arguments)
        drawn = np.bincount(tokens, minlength=size) / points
        assert np.abs(drawn - expected).max() <= 1.01 / points
        assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
        if params.top_p == 1 and not 0 < params.top_k < len(logits):
            # Here tokens lie in the order of their ids, so sums over ranges of ids are exact too.
            assert np.abs(np.cumsum(drawn) - np.cumsum(expected)).max() <= 1.01 / points

    def test_zero_probability_is_never_drawn(self, isa: str) -> None:
        logits = np.full(3000, -np.inf, np.float32)
        logits[[5, 2999]] = 0
        uniforms = np.array([0, 2**52 - 1, 2**52, 2**53 - 1])
        for asked in ({}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 0.1}):
            assert tokens_of(logits, isa, uniforms, **asked) == [5, 5, 2999, 2999]

    def test_equal_tokens_at_the_edge_of_the_nucleus(self, isa: str) -> None:
        """The first of them are kept, and drawn by id."""
        expected = list(range(62, 10_000, 125))
        logits = np.zeros(40_000, np.float32)
        logits[30_000:] = -0.0
        assert tokens_of(logits, isa, evenly(80), top_p=0.25) == expected

    def test_the_nucleus_ends_where_the_weights_of_all_say(self, isa: str) -> None:
        """However little its mass is from its edge, within the bounds of small weights' sum and
        beyond: they are a hundredth of all."""
        logits = random_logits(30_000, seed=1, scale=1.0)
        likely = np.arange(100, 30_000, 1_500)
        logits[likely] = np.linspace(13.0, 11.0, len(likely))
        weights = np.exp(logits.astype(np.float64))
        shares = np.cumsum(weights[likely]) / weights.sum()
        assert 0.01 < 1 - shares[-1] < 0.1
        last = np.array([2**53 - 1])
        for index, share in enumerate(shares[:-1]):
            for nearness in (1e-4, 3e-4, 1e-3, 3e-3):
                inside = tokens_of(logits, isa, last, top_p=share * (1 - nearness))
                beyond = tokens_of(logits, isa, last, top_p=share * (1 + nearness))
                assert (inside, beyond) == ([likely[index]], [likely[index + 1]])


def same(logits: Floats, inputs: dict[str, NDArray[Any]], isa: str) -> None:
    """That the kernel draws what the reference does, or, at an edge, what that draws just beside
    it."""
    tokens, peaks = native.call(SPEC, {"logits": logits, **inputs}, isa, threads=2)
    wanted, tops = draw_tokens(logits, **inputs)
    np.testing.assert_array_equal(peaks, tops)
    for index in np.flatnonzero(tokens != wanted):
        one = {name: array[index : index + 1] for name, array in inputs.items()}
        below, above = (
            draw_tokens(logits, **{**one, "uniform": np.clip(one["uniform"] + by, 0, 2**53 - 1)})[0]
            for by in (-NEAR, NEAR)
        )
        row = logits[one["row"][0]].astype(np.float64)
        times = np.exp((row[tokens[index]] - row.max()) / one["temperature"][0])
        # Between the two may lie tokens that take no more room than this.
        rare = times < NEAR / 2**52
        assert below != above and (rare or tokens[index] in (below, above)), one


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.05, 0.7, 1.0, 4.0]),
            st.sampled_from([0, 0, -1, 1, 3, 40, 300, 5000]),
            st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
            st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
            st.integers(0, 2**53 - 1),
        ),
        min_size=1,
        max_size=6,
    ),
    size=st.sampled_from([1, 2, 63, 64, 65, 777, 6000]),
    scale=st.sampled_from([0.0, 0.1, 2.0, 8.0]),
    seed=st.integers(0, 2**32 - 1),
    holes=st.sampled_from([0.0, 0.5, 0.99]),
    isa=st.sampled_from(library.isas()),
)
@settings(deadline=None)
def test_matches_reference(
    rows: list[tuple[float, int, float, float, int]],
    size: int,
    scale: float,
    seed: int,
    holes: float,
    isa: str,
) -> None:
    """Rows of all kinds in one call, in any order, some of the same logits."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((3, size), np.float32) * np.float32(scale)
    logits = np.where(rng.random(logits.shape) < holes, np.float32(-np.inf), logits)
    columns = zip(*rows, strict=True)
    names = ("temperature", "top_k", "top_p", "min_p", "uniform")
    inputs = {
        name: np.array(column, TYPES[name]) for name, column in zip(names, columns, strict=True)
    }
    inputs["row"] = rng.integers(0, 3, len(rows)).astype(np.int32)
    same(logits, inputs, isa)


@pytest.mark.parametrize("asked", [{}, {"top_p": 0.95}, {"top_k": 1000}, {"min_p": 1e-4}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_matches_reference_on_a_large_vocabulary(
    asked: dict[str, float], scale: float, isa: str
) -> None:
    logits = random_logits(2, 49_152, seed=4, scale=scale)
    uniforms = np.random.default_rng(1).integers(0, 2**53, 20)
    same(logits, draws(uniforms, row=1, **asked), isa)


def test_many_of_equal_and_enormous_logits(isa: str) -> None:
    """A quarter less is the same number here, so a search by steps of that would never end."""
    logits = np.full(200, -1e38, np.float32)
    logits[::64] = 1e38
    assert set(tokens_of(logits, isa, evenly(8), top_k=100)) == {0, 64, 128, 192}


def test_a_nucleus_is_sorted_up_to_a_size(isa: str) -> None:
    logits = random_logits(3 * MOST_SORTED, scale=1e-3)
    few = tokens_of(logits, isa, evenly(100), top_p=(MOST_SORTED - 50) / len(logits))
    assert few == sorted(few, key=lambda token: -logits[token])
    many = tokens_of(logits, isa, evenly(100), top_p=(MOST_SORTED + 50) / len(logits))
    assert many == sorted(many)


def test_a_draw_is_the_same_in_any_company(isa: str) -> None:
    logits = random_logits(12, 5000, seed=3)
    rng = np.random.default_rng(0)
    asked: list[dict[str, float]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 9},
        {"min_p": 0.1},
        {"temperature": 0.0},
    ]
    parts = [
        draws(rng.integers(0, 2**53, 1), row=row, **asked[row % len(asked)]) for row in range(12)
    ]
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    together, _ = native.call(SPEC, {"logits": logits, **inputs}, isa, threads=3)
    for part, token in zip(parts, together, strict=True):
        alone, _ = native.call(SPEC, {"logits": logits, **part}, isa)
        assert alone == [token]


@pytest.mark.parametrize(
    ("values", "peak"),
    [
        ({70: math.nan}, math.nan),
        ({0: math.inf, 99: math.nan, 3: -math.inf}, math.nan),
        ({0: math.inf, 3: -math.inf}, math.inf),
        (dict.fromkeys(range(100), -math.inf), -math.inf),
        ({5: 3e38, 6: -3e38, 7: 3e38}, 3e38),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}])
def test_a_broken_row_has_no_token(
    values: dict[int, float], peak: float, asked: dict[str, float], isa: str
) -> None:
    logits = random_logits(2, 100)
    logits[1, list(values)] = list(values.values())
    inputs = {"logits": logits, **draws(np.array([2**51]), row=1, **asked)}
    tokens, peaks = native.call(SPEC, inputs, isa)
    np.testing.assert_array_equal(peaks, np.array([peak], np.float32))
    assert tokens.tolist() == [5 if peak == 3e38 else -1]
