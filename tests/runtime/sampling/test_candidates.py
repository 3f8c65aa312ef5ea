"""Draws against transformers' warpers and analytic probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.runtime.sampling.rows import Floats, random_logits, row, sample_one

from slipstream.runtime.sampling.candidates import draw_token, largest, nucleus
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler


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


def drawn_frequencies(logits: Floats, params: SamplingParams, points: int) -> NDArray[np.float64]:
    """Share of each token over evenly spaced uniform numbers: its probability up to 1 / points."""
    uniforms = (np.arange(points) + 0.5) / points
    top = logits.max()
    tokens = [draw_token(logits, top, params, u) for u in uniforms]
    return np.bincount(tokens, minlength=len(logits)) / points


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
    @pytest.mark.parametrize("size", [50, 1500])
    def test_equals_transformers(self, arguments: dict[str, Any], size: int) -> None:
        params = SamplingParams(**arguments)
        logits = random_logits(size, seed=size, scale=2.0)
        expected = warped_probabilities(logits, params)
        drawn = drawn_frequencies(logits, params, points=2000)
        assert np.abs(drawn - expected).max() <= 1.01 / 2000
        assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))

    @pytest.mark.parametrize("arguments", WARPERS, ids=str)
    @pytest.mark.parametrize("scale", [0.2, 4.0])
    def test_equals_transformers_over_a_large_vocabulary(
        self, arguments: dict[str, Any], scale: float
    ) -> None:
        params = SamplingParams(**arguments)
        logits = random_logits(50_001, seed=3, scale=scale)
        expected = warped_probabilities(logits, params)
        drawn = drawn_frequencies(logits, params, points=100)
        assert np.abs(drawn - expected).max() <= 1.01 / 100
        assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
        if params.top_p == 1 and not 0 < params.top_k < len(logits):
            # Here tokens lie in the order of their ids, so sums over ranges of ids are exact too.
            assert np.abs(np.cumsum(drawn) - np.cumsum(expected)).max() <= 1.01 / 100

    @pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("scale", [0.05, 1.0, 2.5, 6.0])
    def test_nucleus_is_the_smallest_that_reaches_the_mass(
        self, top_p: float, scale: float
    ) -> None:
        logits = random_logits(50_000, seed=11, scale=scale)
        weights = np.exp(logits - logits.max())
        kept = nucleus(weights, top_p)
        ordered = np.sort(weights.astype(np.float64) / weights.sum(dtype=np.float64))[::-1]
        size = int(np.searchsorted(np.cumsum(ordered), top_p)) + 1
        # The sum over the vocabulary is float32, so the edge may lie a few of many tokens off.
        assert abs(len(kept) - size) <= 1e-3 * size
        assert len(set(kept.tolist())) == len(kept)
        left_out = np.delete(weights, kept)
        assert weights[kept].min() >= left_out.max()

    def test_equal_tokens_at_the_edge_of_the_nucleus(self) -> None:
        kept = nucleus(np.ones(40_000, np.float32), 0.25)
        assert sorted(kept.tolist()) == list(range(10_000))
        weights = np.full(40_000, 0.5, np.float32)
        weights[:20_000] = np.linspace(0.9, 1, 20_000)
        # 19000 of 29000 lie in the first half; 0.8 of all needs 8400 of the equal ones.
        kept = nucleus(weights, 0.8)
        assert len(kept) == pytest.approx(28_400, abs=10)
        assert sorted(kept.tolist()) == list(range(len(kept)))

    def chi_square(self, temperature: float, tokens: Iterable[int], logits: Floats) -> float:
        weights = np.exp(logits.astype(np.float64) / temperature)
        counts = np.bincount(list(tokens), minlength=len(logits))
        expected = weights / weights.sum() * counts.sum()
        return float(((counts - expected) ** 2 / expected).sum())

    def test_seeded_draws_fit_the_analytic_probabilities(self) -> None:
        logits = random_logits(12, seed=5, scale=1.0)
        params = SamplingParams(temperature=0.7)
        sampler = Sampler(12)
        tokens = [
            sampler.sample(logits[None], [row(params, seed=9, output=range(i))]).token_ids[0]
            for i in range(8000)
        ]
        # 11 degrees of freedom: the 99.99th percentile is 37.4.
        assert self.chi_square(0.7, tokens, logits) < 37.4
        assert self.chi_square(0.8, tokens, logits) > 37.4, "the test can tell 0.7 from 0.8"

    def test_draws_across_seeds_fit_too(self) -> None:
        logits = random_logits(12, seed=6, scale=1.0)
        rows = [row(SamplingParams(), seed=seed) for seed in range(8000)]
        tokens = Sampler(12).sample(np.broadcast_to(logits, (8000, 12)), rows).token_ids
        assert self.chi_square(1.0, tokens, logits) < 37.4

    def test_zero_probability_is_never_drawn(self) -> None:
        logits = np.full(3000, -np.inf, np.float32)
        logits[[5, 2999]] = 0
        for params in (SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(top_k=50)):
            top = logits.max()
            drawn = {draw_token(logits, top, params, u) for u in (0.0, 0.4999, 0.5001, 1 - 2**-53)}
            assert drawn == {5, 2999}

    @pytest.mark.parametrize("temperature", [1.1e-5, 1000.0])
    def test_extreme_temperatures_and_logits_stay_finite(self, temperature: float) -> None:
        logits = np.array([3e38, -3e38, 0, -np.inf, 2.9e38], np.float32)
        token = sample_one(logits, row(SamplingParams(temperature=temperature)))
        assert token == 0


@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 1500),
        elements=st.sampled_from([-math.inf, -2.0, 0.0, 1.0, 1.5, 3.0]),
        fill=st.floats(-10, 10, width=32),
    ),
    k=st.integers(1, 700),
)
@settings(deadline=None)
def test_largest_equals_a_full_sort(values: Floats, k: int) -> None:
    ids = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = [i for i in ids if values[i] > -math.inf and (values[i] >= values[ids[:k][-1]])]
    assert largest(values, k).tolist() == expected
