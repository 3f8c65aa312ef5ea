"""Draws of the sampler against analytic probabilities."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from tests.runtime.sampling.rows import Floats, random_logits, row, sample_one

from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler


def chi_square(temperature: float, tokens: Iterable[int], logits: Floats) -> float:
    weights = np.exp(logits.astype(np.float64) / temperature)
    counts = np.bincount(list(tokens), minlength=len(logits))
    expected = weights / weights.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_seeded_draws_fit_the_analytic_probabilities() -> None:
    logits = random_logits(12, seed=5, scale=1.0)
    params = SamplingParams(temperature=0.7)
    sampler = Sampler(12)
    tokens = [
        sampler.sample(logits[None], [row(params, seed=9, output=range(i))]).token_ids[0]
        for i in range(8000)
    ]
    # 11 degrees of freedom: the 99.99th percentile is 37.4.
    assert chi_square(0.7, tokens, logits) < 37.4
    assert chi_square(0.8, tokens, logits) > 37.4, "the test can tell 0.7 from 0.8"


def test_draws_across_seeds_fit_too() -> None:
    logits = random_logits(12, seed=6, scale=1.0)
    rows = [row(SamplingParams(), seed=seed) for seed in range(8000)]
    tokens = Sampler(12).sample(np.broadcast_to(logits, (8000, 12)), rows).token_ids
    assert chi_square(1.0, tokens, logits) < 37.4


@pytest.mark.parametrize("temperature", [1.1e-5, 1000.0])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits = np.array([3e38, -3e38, 0, -np.inf, 2.9e38], np.float32)
    token = sample_one(logits, row(SamplingParams(temperature=temperature)))
    assert token == 0
