"""The sampler against transformers' warpers, slow references, analytic probabilities and itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.candidates import draw_token, largest, nucleus
from slipstream.runtime.sampling.logits_processors import process_logits
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler, UniformStream, token_logprobs

Floats = NDArray[np.float32]


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Floats:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(scale)


def row(
    params: SamplingParams,
    *,
    seed: int = 0,
    prompt: Sequence[int] = (1, 2),
    output: Sequence[int] = (),
    eos_token_ids: frozenset[int] = frozenset(),
    target: int | None = None,
) -> SamplingRow:
    return SamplingRow(params, prompt, output, seed, eos_token_ids, target, len(output))


def sample_one(logits: Floats, sampling_row: SamplingRow) -> int:
    return Sampler(len(logits)).sample(logits[None], [sampling_row]).token_ids[0]


class TestGreedy:
    @pytest.mark.parametrize("temperature", [0, 1e-6])
    def test_is_argmax_of_each_row(self, temperature: float) -> None:
        logits = random_logits(5, 1000)
        rows = [row(SamplingParams(temperature=temperature, top_k=5, top_p=0.1))] * 5
        result = Sampler(1000).sample(logits, rows)
        assert result.token_ids == logits.argmax(axis=1).tolist()
        assert result.logprobs == [None] * 5

    def test_ties_go_to_the_lowest_id(self) -> None:
        assert sample_one(np.zeros(64, np.float32), row(SamplingParams(temperature=0))) == 0

    def test_applies_logit_bias(self) -> None:
        params = SamplingParams(temperature=0, logit_bias={7: 50.0})
        assert sample_one(random_logits(100), row(params)) == 7


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


def slow_edit(logits: Floats, sampling_row: SamplingRow) -> list[float]:
    """Every edit, token by token, from its definition."""
    params, output = sampling_row.params, list(sampling_row.output)
    ending = set(params.stop_token_ids)
    if not params.ignore_eos:
        ending |= sampling_row.eos_token_ids
    edited = []
    for token, value in enumerate(logits.tolist()):
        banned = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        banned |= len(output) < params.min_tokens and token in ending
        for *beginning, last in params.bad_words_token_ids:
            heard = output[len(output) - len(beginning) :] if beginning else []
            banned |= last == token and heard == beginning
        value += (params.logit_bias or {}).get(token, 0.0)
        if token in output or token in sampling_row.prompt:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= output.count(token) * params.frequency_penalty
        value -= (token in output) * params.presence_penalty
        edited.append(-math.inf if banned else value)
    return edited


SIZE = 20
TOKENS = st.integers(0, SIZE - 1)


@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(TOKENS, min_size=1, max_size=12),
    output=st.lists(TOKENS, max_size=12),
    eos=st.frozensets(TOKENS, max_size=2),
    params=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
            "presence_penalty": st.sampled_from([-0.5, 0.0, 1.5]),
            "frequency_penalty": st.sampled_from([-0.25, 0.0, 0.75]),
            "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
            "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=15),
            "bad_words_token_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), max_size=8),
            "min_tokens": st.integers(0, 12),
            "stop_token_ids": st.lists(TOKENS, max_size=3),
            "ignore_eos": st.booleans(),
        },
    ),
)
def test_edits_equal_their_definition(
    seed: int, prompt: list[int], output: list[int], eos: frozenset[int], params: dict[str, Any]
) -> None:
    logits = random_logits(SIZE, seed=seed)
    before = logits.copy()
    sampling_row = row(SamplingParams(**params), prompt=prompt, output=output, eos_token_ids=eos)
    edited = process_logits(logits, sampling_row)
    np.testing.assert_allclose(edited, slow_edit(logits, sampling_row), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(100)
    prompt, output = [3, 7, 7, 20], [7, 50, 99]
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([prompt + output]), torch.from_numpy(logits[None].copy()))
    params = SamplingParams(repetition_penalty=1.3)
    edited = process_logits(logits, row(params, prompt=prompt, output=output))
    np.testing.assert_allclose(edited, expected[0].numpy(), rtol=1e-6)


@given(
    allowed=st.lists(TOKENS, min_size=1, max_size=2),
    bad=st.lists(TOKENS, max_size=3),
    eos=st.frozensets(TOKENS, max_size=3),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_allow_list_holds_even_if_all_of_it_is_forbidden(
    allowed: list[int], bad: list[int], eos: frozenset[int], temperature: float
) -> None:
    params = SamplingParams(
        temperature=temperature,
        allowed_token_ids=allowed,
        bad_words_token_ids=[[token] for token in bad],
        min_tokens=5,
    )
    assert sample_one(random_logits(SIZE), row(params, eos_token_ids=eos)) in allowed


def test_a_vocabulary_of_bad_words_still_yields_the_likeliest() -> None:
    logits = random_logits(SIZE)
    params = SamplingParams(bad_words_token_ids=[[token] for token in range(SIZE)])
    assert sample_one(logits, row(params)) == logits.argmax()


class TestLogprobs:
    def test_equal_log_softmax_of_the_models_own_logits(self) -> None:
        logits = random_logits(4, 2000, seed=2)
        params = SamplingParams(
            temperature=0.3, top_k=3, logprobs=7, logit_bias={5: 20.0}, repetition_penalty=1.5
        )
        result = Sampler(2000).sample(logits, [row(params, seed=i) for i in range(4)])
        truth = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
        best = truth.topk(7, dim=-1)
        for i, (token, logprobs) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
            assert logprobs is not None
            assert logprobs.token_id == token
            assert logprobs.logprob == pytest.approx(float(truth[i, token]), abs=1e-5)
            assert logprobs.rank == int((truth[i] > truth[i, token]).sum()) + 1
            assert list(logprobs.top) == best.indices[i].tolist()
            values, ranks = zip(*logprobs.top.values(), strict=True)
            np.testing.assert_allclose(values, best.values[i], atol=1e-5)
            assert ranks == (1, 2, 3, 4, 5, 6, 7)

    def test_none_zero_and_all(self) -> None:
        logits = random_logits(3, 50)
        rows = [row(SamplingParams(logprobs=count)) for count in (None, 0, -1)]
        none, zero, everything = Sampler(50).sample(logits, rows).logprobs
        assert none is None
        assert zero is not None
        assert zero.top == {}
        assert everything is not None
        assert sorted(everything.top) == list(range(50))
        assert math.fsum(math.exp(value) for value, _ in everything.top.values()) == pytest.approx(
            1
        )

    def test_prompt_rows_score_their_target_and_sample_nothing(self) -> None:
        logits = random_logits(2, 300)
        rows = [
            row(SamplingParams(prompt_logprobs=2), target=17),
            row(SamplingParams(prompt_logprobs=2, temperature=0)),
        ]
        result = Sampler(300).sample(logits, rows)
        assert result.token_ids == [-1, int(logits[1].argmax())]
        scored, sampled = result.logprobs
        assert sampled is None
        assert scored == token_logprobs(logits[0], 17, 2)
        assert scored.token_id == 17
        assert len(scored.top) == 2

    def test_ties_rank_by_id(self) -> None:
        logits = np.array([1, 2, 2, -np.inf, 2], np.float32)
        assert [token_logprobs(logits, token, 0).rank for token in range(5)] == [4, 1, 2, 5, 3]
        assert list(token_logprobs(logits, 0, 2).top) == [1, 2]
        assert token_logprobs(logits, 3, 0).logprob == -math.inf


MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {},
    {"top_k": 10},
    {"top_p": 0.7, "logprobs": 0},
    {"min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "frequency_penalty": 0.5},
    {"allowed_token_ids": [4, 5, 6]},
    {"temperature": 0, "min_tokens": 9, "stop_token_ids": [3]},
    {"bad_words_token_ids": [[8, 2]], "presence_penalty": 1.0},
]


class TestReproducibility:
    def mixed(self, size: int) -> tuple[Floats, list[SamplingRow]]:
        rows = [
            row(SamplingParams(**arguments), seed=100 + i, output=[2, 5, 8, i])
            for i, arguments in enumerate(MIXED)
        ]
        rows.append(row(SamplingParams(prompt_logprobs=1), target=9))
        return random_logits(len(rows), size, seed=8), rows

    @pytest.mark.parametrize("size", [64, 5000])
    def test_results_do_not_depend_on_the_batch(self, size: int) -> None:
        logits, rows = self.mixed(size)
        together = Sampler(size).sample(logits, rows)
        backwards = Sampler(size).sample(logits[::-1], rows[::-1])
        assert backwards.token_ids == together.token_ids[::-1]
        assert backwards.logprobs == together.logprobs[::-1]
        for i in range(len(rows)):
            alone = Sampler(size).sample(logits[i : i + 1].copy(), [rows[i]])
            assert alone.token_ids == together.token_ids[i : i + 1]
            assert alone.logprobs == together.logprobs[i : i + 1]

    def test_logits_are_left_alone(self) -> None:
        logits, rows = self.mixed(64)
        before = logits.copy()
        Sampler(64).sample(logits, rows)
        np.testing.assert_array_equal(logits, before)

    def test_a_resumed_sequence_goes_on_the_same(self) -> None:
        logits = random_logits(10, 500, seed=4, scale=0.1)
        params = SamplingParams()

        def generate(output: list[int], sampler: Sampler) -> list[int]:
            output = list(output)
            while len(output) < 10:
                at = len(output)
                sampling_row = row(params, seed=77, output=output)
                output += sampler.sample(logits[at : at + 1], [sampling_row]).token_ids
            return output

        whole = generate([], Sampler(500))
        assert generate(whole[:4], Sampler(500)) == whole
        assert len(set(whole)) > 5, "positions draw differently"

    def test_seeds_draw_differently(self) -> None:
        logits = np.zeros((50, 1000), np.float32)
        rows = [row(SamplingParams(), seed=seed) for seed in range(50)]
        assert len(set(Sampler(1000).sample(logits, rows).token_ids)) > 40

    @given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31))
    def test_uniform_numbers_are_philox_at_a_counter(self, seed: int, position: int) -> None:
        key = np.array([seed, 0], np.uint64)
        counter = np.array([position, 0, 0, 0], np.uint64)
        expected = (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) / 2**53
        stream = UniformStream()
        stream.at(seed ^ 1, position + 5)
        assert stream.at(seed, position) == expected


class TestBrokenLogits:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("arguments", [{"temperature": 0}, {}, {"top_k": 2}, {"logprobs": 1}])
    def test_nan_and_infinity_are_reported(self, value: float, arguments: dict[str, Any]) -> None:
        logits = random_logits(2, 100)
        logits[1, 42] = value
        result = Sampler(100).sample(logits, [row(SamplingParams(**arguments))] * 2)
        assert list(result.failed) == [1], "the row before it has its token"
        assert isinstance(result.failed[1], ExecutionError)
        assert "expected a finite number" in str(result.failed[1])
        alone = Sampler(100).sample(logits[:1], [row(SamplingParams(**arguments))])
        assert (result.token_ids[0], result.logprobs[0]) == (alone.token_ids[0], alone.logprobs[0])

    @pytest.mark.parametrize("arguments", [{"temperature": 0}, {}, {"allowed_token_ids": [3]}])
    def test_nothing_but_minus_infinity_is_reported(self, arguments: dict[str, Any]) -> None:
        logits = np.full((1, 100), -np.inf, np.float32)
        result = Sampler(100).sample(logits, [row(SamplingParams(**arguments))])
        assert isinstance(result.failed[0], ExecutionError) and "-inf" in str(result.failed[0])
