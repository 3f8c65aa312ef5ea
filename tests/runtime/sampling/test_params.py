"""Sampling parameters: what is accepted, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime.sampling.rows import row, sample_one

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.params import SamplingParams

INVALID: dict[str, tuple[object, ...]] = {
    "n": (0, -1, 1.0, True, None, "2"),
    "max_tokens": (0, -5, 2.5, True, "16"),
    "min_tokens": (-1, None, 1.5),
    "temperature": (-0.1, math.nan, math.inf, True, "1", None, 1e9),
    "top_k": (-2, 1.5, None, True),
    "top_p": (-0.0001, 1.0001, -1, math.nan, None),
    "min_p": (-0.01, 1.01, math.nan),
    "repetition_penalty": (0, -1.0, 1e-39, 5e-324, math.inf, math.nan),
    "presence_penalty": (-2.1, 2.1, math.nan, "0"),
    "frequency_penalty": (-2.1, 2.1, math.inf, False),
    "seed": (-(2**63) - 1, 2**64, 1.0, "7", True),
    "stop": (7, [7], [""], "", b"x", [None]),
    "stop_token_ids": (5, [-1], ["1"], [True], "12", [1.0]),
    "include_stop_str_in_output": (1, None, "yes"),
    "ignore_eos": (0, "no"),
    "skip_special_tokens": (None, 1),
    "logit_bias": ([(1, 2.0)], {"1": 2.0}, {1: 100.5}, {1: math.nan}, {-1: 0.0}),
    "allowed_token_ids": ([], [-3], [None], 3),
    "bad_words": ([""], 3, [3]),
    "bad_words_token_ids": (1, "ab", [[]], [[-1]], [5], [["a"]]),
    "logprobs": (-2, 1.5, True),
    "prompt_logprobs": (-2, "5"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in INVALID.items() for value in values]
)
def test_invalid_value_is_refused_by_name_and_with_a_remedy(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert ";" in str(caught.value), "a remedy follows the semicolon"
    assert caught.value.param == name


def test_negative_seeds_are_64_bits_and_minus_one_is_none() -> None:
    assert [SamplingParams(seed=seed).seed for seed in (-1, -2, -(2**63), 7, 2**64 - 1)] == [
        None,
        2**64 - 2,
        2**63,
        7,
        2**64 - 1,
    ]


def test_top_p_0_is_greedy() -> None:
    assert SamplingParams(top_p=0).greedy and not SamplingParams(top_p=1e-9).greedy


def test_message_says_value_range_and_remedy() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "top_p=1.5 is not a number in [0, 1]; use 1 to keep all tokens"
    assert caught.value.param == "top_p"


def test_defaults_sample_without_any_filter() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature) == (1, None, 1.0)
    assert not (params.greedy or params.penalizes or params.edits_logits)


@given(
    temperature=st.floats(0, 1000),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    top_k=st.integers(-1, 200_000),
    penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_everything_in_range_is_accepted(
    temperature: float, top_p: float, min_p: float, top_k: int, penalty: float, seed: int | None
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        presence_penalty=penalty,
        frequency_penalty=-penalty,
        seed=seed,
    )
    assert params.penalizes == (penalty != 0)
    assert params.greedy == (temperature < 1e-5)
    assert dataclasses.replace(params) == params


def test_numpy_scalars_become_plain_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]
    )
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert params.stop_token_ids == (1, 2)


def test_a_single_stop_string_and_repeats() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")


def test_none_means_no_stops_and_no_bad_words() -> None:
    names = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids")
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()  # type: ignore[arg-type]


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens=9 is more than max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)


@pytest.mark.parametrize(
    "edit",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words_token_ids": [[1, 2]]},
    ],
)
def test_edits_logits(edit: dict[str, Any]) -> None:
    assert SamplingParams(**edit).edits_logits


def test_is_frozen_and_survives_pickling() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 2.0}, temperature=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params
    assert copy.greedy


class TestFromDict:
    def test_reads_json(self) -> None:
        params = SamplingParams.from_dict({"logit_bias": {"7": -100}, "seed": None, "stop": "x"})
        assert params == SamplingParams(logit_bias={7: -100.0}, stop=["x"])

    def test_unknown_names_are_refused_with_the_known_ones(self) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams.from_dict({"temprature": 1, "top_k": 3})
        message = str(caught.value)
        assert "'temprature'" in message
        assert "temperature, top_k" in message

    def test_derived_fields_cannot_be_set(self) -> None:
        with pytest.raises(InvalidRequestError, match="'greedy'"):
            SamplingParams.from_dict({"greedy": True})

    def test_logit_bias_keys_must_be_token_ids(self) -> None:
        with pytest.raises(InvalidRequestError, match="logit_bias key='x'"):
            SamplingParams.from_dict({"logit_bias": {"x": 1}})


class TestFromGenerationConfig:
    CONFIG: ClassVar[dict[str, Any]] = {
        "temperature": 0.6,
        "top_p": 0.9,
        "max_new_tokens": 64,
        "eos_token_id": [1, 2],
    }

    def test_recommended_values_become_defaults(self) -> None:
        params = SamplingParams.from_generation_config(self.CONFIG)
        assert params == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=64)

    def test_what_it_does_not_name_may_be_given(self) -> None:
        params = SamplingParams.from_generation_config(self.CONFIG, {"temperature": 0, "n": 2})
        assert params == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=64, n=2)

    def test_a_bad_recommendation_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="top_p=7"):
            SamplingParams.from_generation_config({"top_p": 7})


class TestResolve:
    @pytest.mark.parametrize(
        "given_ids",
        [
            {"stop_token_ids": [10]},
            {"allowed_token_ids": [3, 10]},
            {"logit_bias": {10: 1.0}},
            {"bad_words_token_ids": [[1], [2, 10]]},
        ],
    )
    def test_ids_outside_the_vocabulary(self, given_ids: dict[str, Any]) -> None:
        params = SamplingParams(**given_ids)
        with pytest.raises(InvalidRequestError, match=r"holds token 10.*from 0 to 9"):
            params.resolve(10)
        assert params.resolve(11) == params

    def test_bad_words_at_the_start_and_after_a_space(self) -> None:
        def encode(text: str) -> list[int]:
            return [ord(char) for char in text]

        params = SamplingParams(bad_words=["hi"], bad_words_token_ids=[[1, 2]])
        resolved = params.resolve(256, encode)
        assert resolved.bad_words_token_ids == ((1, 2), (104, 105), (32, 104, 105))
        assert resolved.edits_logits
        assert resolved.resolve(256) == resolved, "resolving twice changes nothing"

    def test_bad_words_without_a_tokenizer(self) -> None:
        with pytest.raises(InvalidRequestError, match="bad_words_token_ids"):
            SamplingParams(bad_words="x").resolve(256)

    def test_an_encoder_beyond_the_model(self) -> None:
        with pytest.raises(InvalidRequestError, match="holds token 300"):
            SamplingParams(bad_words="x").resolve(256, lambda _: [300])


def test_extremes_that_are_accepted_leave_every_logit_a_number() -> None:
    """What is at the ends of the ranges, alone and together; a row that is not finite fails."""
    ends: dict[str, tuple[float, ...]] = {
        "temperature": (0, 1e-5, 1000),
        "top_p": (5e-324, 1),
        "min_p": (0, 5e-324, 1),
        "repetition_penalty": (1e-3, 1000),
        "presence_penalty": (-2, 2),
        "frequency_penalty": (-2, 2),
    }
    logits = np.array([1e4, -1e4, 3, 0, -3, 1e-30], np.float32)
    for values in itertools.product(*ends.values()):
        chosen: dict[str, Any] = dict(zip(ends, values, strict=True))
        params = SamplingParams(**chosen, logit_bias={1: 100, 2: -100})
        tried = row(params, prompt=[0, 1, 2], output=[1, 2, 3] * 50)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert sample_one(logits, tried) in range(6), values


def test_a_key_of_thousands_of_digits_is_no_token() -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias key"):
        SamplingParams.from_dict({"logit_bias": {"9" * 5000: 1.0}})


def test_allowed_tokens_are_counted_once() -> None:
    assert SamplingParams(allowed_token_ids=[5, 3, 5, 5]).allowed_token_ids == (5, 3)
