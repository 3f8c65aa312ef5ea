"""The sampler against transformers' warpers, slow references, analytic probabilities and itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime.sampling.rows import Floats, random_logits, row, sample_one

from slipstream.errors import ExecutionError
from slipstream.plugins.top_token.reference import top_token
from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.draws import UniformStream
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler, token_logprobs


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

    def test_listed_tokens_are_scored_in_place_of_the_likeliest(self) -> None:
        logits = random_logits(1, 300)
        params = SamplingParams(temperature=0, logprob_token_ids=[17, 3])
        assert params.logprobs == 0
        (entry,) = Sampler(300).sample(logits, [row(params)]).logprobs
        every = token_logprobs(logits[0], 17, -1).top
        assert entry is not None and list(entry.top) == [17, 3]
        for token, (value, rank) in entry.top.items():
            assert rank == every[token][1] and value == pytest.approx(every[token][0])

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

    @pytest.mark.parametrize("size", [64, 5000])
    def test_what_the_graph_has_found_changes_nothing(self, size: int) -> None:
        logits, rows = self.mixed(size)
        logits[0, 5] = math.nan
        tokens, peaks = top_token(logits)
        searched = Sampler(size).sample(logits, rows)
        found = Sampler(size).sample(logits, rows, (tokens.tolist(), peaks.tolist()))
        assert (found.token_ids, found.logprobs) == (searched.token_ids, searched.logprobs)
        assert {i: str(e) for i, e in found.failed.items()} == {0: str(searched.failed[0])}

    @pytest.mark.parametrize("last", [{"temperature": 0}, {"temperature": 0.5}, {"logprobs": 1}])
    def test_logits_are_not_read_of_rows_that_want_the_best_token(
        self, last: dict[str, Any]
    ) -> None:
        logits = np.full((3, 100), np.nan, np.float32)
        plain = row(SamplingParams(temperature=0))
        tops = [4, 5, 6], [1.0, 2.0, math.inf]
        result = Sampler(100).sample(logits, [plain, plain, row(SamplingParams(**last))], tops)
        assert result.token_ids == [4, 5, -1] and list(result.failed) == [2]

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
        expected = int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11
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

    def test_numbers_that_add_up_to_none_break_their_rows_alone(self) -> None:
        logits = random_logits(4, 100)
        logits[:2, 42] = 3e38
        logits[2, 42], logits[3] = math.inf, -math.inf
        result = Sampler(100).sample(logits, [row(SamplingParams(temperature=0))] * 4)
        assert result.token_ids[:2] == [42, 42] and list(result.failed) == [2, 3]
