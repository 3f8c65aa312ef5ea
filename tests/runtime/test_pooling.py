from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.builder.contract import Pooling
from slipstream.errors import InvalidRequestError
from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.pooling import Pool, PoolingParams, broken_states, finished, similarity
from slipstream.runtime.sampling.params import SamplingParams

EMBED = Pooling("embed", "last", True, 4, 100, "cosine", {}, None)
SCORE = replace(EMBED, task="score", dimensions=1)
PLAIN = PoolingParams()
Mode = Literal["last", "mean"]


@given(st.data())
def test_however_a_prompt_is_cut_and_begun_again(data: st.DataObject) -> None:
    """Chunks of any length, after some of which the sequence is preempted and begins anew."""
    length = data.draw(st.integers(1, 12))
    mode: Mode = data.draw(st.sampled_from(["last", "mean"]))
    states = np.random.default_rng(length).normal(size=(length, 4)).astype(np.float32)
    pool, start = Pool(replace(EMBED, mode=mode, normalize=False), PLAIN, length), 0
    while pool.value is None:
        stop = data.draw(st.integers(start + 1, length))
        wanted = pool.wanted(start, stop)
        pool.take(wanted.start, states[wanted.start : wanted.stop])
        begins = stop < length and data.draw(st.booleans())
        start = 0 if begins else stop
    want = states[-1] if mode == "last" else states.mean(axis=0)
    np.testing.assert_allclose(pool.value, want, rtol=1e-5)


def test_a_state_that_comes_twice_counts_once() -> None:
    """Of a step that was on its way when its sequence was preempted."""
    pool = Pool(replace(EMBED, mode="mean", normalize=False), PLAIN, 3)
    states = np.repeat(np.array([[1], [2], [6]], np.float32), 4, axis=1)
    assert not pool.take(0, states[:1])
    assert not pool.take(0, states[:1])
    assert not pool.take(0, states[:2])
    assert pool.take(1, states[1:])
    assert pool.value is not None and pool.value.tolist() == [3, 3, 3, 3]


def test_a_vector_is_cut_before_it_is_brought_to_length_one() -> None:
    mean = np.array([3.0, 4.0, 12.0, 0.0])
    np.testing.assert_allclose(finished(mean, EMBED, PoolingParams(dimensions=2)), [0.6, 0.8])
    as_it_is = finished(mean, EMBED, PoolingParams(dimensions=3, normalize=False))
    assert as_it_is.tolist() == [3, 4, 12] and as_it_is.dtype == np.float32
    assert finished(np.zeros(4), EMBED, PLAIN).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("logits", "score"), [([2.0, 1.0], 0.7310586), ([1.0], 0.7310586), ([-900.0, 900.0], 0.0)]
)
def test_a_score_is_the_probability_of_yes(logits: list[float], score: float) -> None:
    found = finished(np.array(logits), SCORE, PLAIN)
    assert found.shape == (1,) and found[0] == pytest.approx(score)
    odds = finished(np.array(logits), SCORE, PoolingParams(normalize=False))
    assert odds[0] == logits[0] - sum(logits[1:])


def test_similarity() -> None:
    a, b = np.array([3, 4], np.float32), np.array([4, 3], np.float32)
    assert similarity(EMBED, a, b) == pytest.approx(0.96)
    assert similarity(replace(EMBED, similarity="dot"), a, b) == 24
    assert similarity(EMBED, a * 0, b) == 0


def test_only_rows_that_are_pooled_break() -> None:
    params = SamplingParams()
    rows = [SamplingRow(params, [], [], 0, pooled=pooled) for pooled in (True, False, True)]
    states = np.array([[np.nan, 1], [np.inf, 1], [0, 1]], np.float32)
    assert list(broken_states(rows, states)) == [0]


@pytest.mark.parametrize(
    "values", [{"dimensions": 0}, {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -2}]
)
def test_numbers_out_of_range(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InvalidRequestError, match=f"{name} is .*; it must be at least 1") as caught:
        PoolingParams(**values)
    assert caught.value.param == name
