"""Reading requests, without a server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_tokenizer
from slipstream.server.core.sampling import DEFAULT_COMPLETION_TOKENS
from slipstream.server.triton.interface import (
    INPUTS,
    OUTPUTS,
    SAMPLING,
    SWITCHES,
    WITHOUT_MEANING,
)
from slipstream.server.triton.parameters import Query, read_query

DEFAULTS = SamplingParams(temperature=0.6, top_k=40)
TOKENIZER = counting_tokenizer()
UNSAID = dataclasses.replace(DEFAULTS, max_tokens=DEFAULT_COMPLETION_TOKENS)


def strings(*texts: str | bytes) -> NDArray[Any]:
    """A tensor of texts, as Triton's Python backend has it."""
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return np.array(raw, np.object_)


def read(
    parameters: dict[str, Any] | None = None,
    text: str | bytes = "hi",
    request_id: str = "",
    **inputs: Any,  # noqa: ANN401 - arrays
) -> Query:
    """A request with these inputs and request parameters."""
    inputs = {"text_input": strings(text), **inputs}
    return read_query(inputs, parameters or {}, DEFAULTS, TOKENIZER, request_id)


def given(values: dict[str, Any]) -> NDArray[Any]:
    """The input ``sampling_parameters``."""
    return strings(json.dumps(values))


def test_what_is_not_said_is_the_models_default() -> None:
    assert read() == Query("hi", UNSAID, stream=False, echo=True, returns=frozenset())


def test_max_tokens_is_that_of_a_completion_over_http() -> None:
    assert read().params.max_tokens == DEFAULT_COMPLETION_TOKENS == 16
    model = dataclasses.replace(DEFAULTS, max_tokens=300)
    inputs = {"text_input": strings("hi")}
    assert read_query(inputs, {}, model, TOKENIZER).params.max_tokens == 300
    assert read_query(inputs, {"max_tokens": 7}, model, TOKENIZER).params.max_tokens == 7


def test_every_input_reaches_its_field() -> None:
    values: dict[str, Any] = {
        "max_tokens": np.array([9], np.int32),
        "min_tokens": np.array([2], np.int32),
        "temperature": np.array([0.7], np.float32),
        "top_k": np.array([5], np.int32),
        "top_p": np.array([0.9], np.float32),
        "repetition_penalty": np.array([1.1], np.float32),
        "presence_penalty": np.array([0.2], np.float32),
        "frequency_penalty": np.array([-0.3], np.float32),
        "random_seed": np.array([2**64 - 1], np.uint64),
        "stop_words": strings("###", "end"),
        "bad_words": strings("no"),
        "num_return_sequences": np.array([3], np.int32),
        "end_id": np.array([2], np.int32),
    }
    assert values.keys() == SAMPLING.keys()
    # Decimals are those that were written, not those of float32.
    assert read(**values).params == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        seed=2**64 - 1,
        stop=("###", "end"),
        bad_words=("no",),
        n=3,
        stop_token_ids=(2,),
    )


FIELDS = {field.name for field in dataclasses.fields(SamplingParams) if field.init}


@pytest.mark.parametrize("field", sorted(FIELDS - {"prompt_logprobs", "shown_special_tokens"}))
def test_every_sampling_parameter_can_be_given_as_json_and_as_a_request_parameter(
    field: str,
) -> None:
    values: dict[str, Any] = {
        "n": 2, "max_tokens": 7, "min_tokens": 1, "temperature": 0.25, "top_k": 3, "top_p": 0.5,
        "min_p": 0.125, "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -1,
        "seed": 5, "stop": ["x", "y"], "stop_token_ids": [4], "include_stop_str_in_output": True,
        "ignore_eos": True, "logit_bias": {"5": -2.5}, "allowed_token_ids": [1, 2],
        "bad_words": ["z"], "bad_words_token_ids": [[1, 2]], "logprobs": 3,
        "skip_special_tokens": False, "structured": {"regex": "[0-9]+"}, "logprob_token_ids": [3],
        "prediction": "ab", "prediction_token_ids": [1, 2], "speculative": False,
    }  # fmt: skip
    base = {name: getattr(UNSAID, name) for name in values}
    expected = SamplingParams.from_dict({**base, field: values[field]})
    assert read(sampling_parameters=given({field: values[field]})).params == expected
    # A parameter of a request is a number, a boolean or a text.
    value = values[field]
    text = value if isinstance(value, int | float | bool) else json.dumps(value)
    if field in ("stop", "bad_words"):
        expected = SamplingParams.from_dict({**base, field: value[0]})
        text = value[0]
    assert read({field: text}).params == expected


def test_numbers_and_booleans_may_be_text_as_clients_of_vllms_backend_send_them() -> None:
    values = {"temperature": "0.1", "max_tokens": "100", "ignore_eos": "true", "stream": "true"}
    query = read(sampling_parameters=given(values))
    assert (query.params.temperature, query.params.max_tokens) == (0.1, 100)
    assert query.params.ignore_eos and query.stream


def test_text_for_text_is_not_read_as_json() -> None:
    assert read({"stop": "5"}).params.stop == ("5",)
    assert read(sampling_parameters=given({"bad_words": '["a"]'})).params.bad_words == ('["a"]',)


def test_null_and_empty_words_are_as_if_not_there() -> None:
    assert read(sampling_parameters=given({"temperature": None, "stop": None})).params == UNSAID
    frontend = {"best_of": 1, "logprobs": False}  # what Triton's OpenAI frontend sends
    assert read(sampling_parameters=given(frontend)).params == UNSAID
    assert read(sampling_parameters=strings("")).params == UNSAID
    assert read(stop_words=strings(""), bad_words=strings("", "")).params == UNSAID
    assert read(bad_words=np.array([], np.object_)).params == UNSAID


@pytest.mark.parametrize(
    ("stream", "exclude", "echo"),
    [
        (False, None, True),
        (False, False, True),
        (False, True, False),
        (True, None, False),
        (True, True, False),
        (True, False, True),
    ],
)
def test_when_the_prompt_is_part_of_the_text(
    stream: bool, exclude: bool | None, echo: bool
) -> None:
    inputs: dict[str, Any] = (
        {} if exclude is None else {"exclude_input_in_output": np.array([exclude])}
    )
    assert read(stream=np.array([stream]), **inputs).echo is echo


@pytest.mark.parametrize(
    ("stream", "exclude", "echo"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, False)],
)
def test_no_stream_of_tensorrt_llm_begins_with_the_prompt(
    stream: bool, exclude: bool, echo: bool
) -> None:
    inputs = {"exclude_input_in_single_output": np.array([exclude]), "stream": np.array([stream])}
    given = {"text_input": strings("hi"), **inputs}
    assert read_query(given, {}, DEFAULTS, TOKENIZER).echo is echo


def test_flags_choose_outputs_and_logprobs_are_computed_for_them() -> None:
    ours = {"cum_log_probs", "output_log_probs"}
    always = {"text_output", "reasoning_output", "tool_calls"}
    for name in OUTPUTS.keys() - always - ours:
        assert f"return_{name}" in SWITCHES
        assert read({f"return_{name}": True}).returns == {name}
        assert read({f"return_{name}": False}).returns == frozenset()
    assert read({"return_num_input_tokens": True}).params.logprobs is None
    assert read({"return_cumulative_logprob": True}).params.logprobs == 0
    assert read({"return_logprobs": True, "logprobs": 4}).params.logprobs == 4
    query = read({"return_log_probs": True})
    assert query.returns == ours and query.params.logprobs == 0


@pytest.mark.parametrize(
    ("parameters", "computed", "told"),
    [
        ({}, None, False),
        ({"return_cumulative_logprob": True}, 0, False),
        ({"logprobs": 0}, 0, True),
        ({"logprobs": 4, "return_cumulative_logprob": True}, 4, True),
    ],
)
def test_log_probabilities_are_told_to_who_said_how_many(
    parameters: dict[str, Any], computed: int | None, told: bool
) -> None:
    query = read({"return_logprobs": True, **parameters})
    assert (query.params.logprobs, query.logprobs) == (computed, told)


def test_what_says_nothing_here_is_taken_from_clients_of_tensorrt_llm() -> None:
    values: dict[str, Any] = {
        "beam_width": np.array([[1]], np.int32),
        "length_penalty": np.array([[1.0]], np.float32),
        "pad_id": np.array([[0]], np.int32),
    }
    assert values.keys() == WITHOUT_MEANING.keys()
    assert read(**values) == read({"beam_width": "1", "pad_id": 2}) == read()


def test_a_batch_of_one_is_read_like_a_request_without_batch() -> None:
    inputs = {
        "text_input": strings("hi").reshape(1, 1),
        "max_tokens": np.array([[5]], np.int32),
        "stop_words": strings("a", "b").reshape(1, 2),
        "stream": np.array([[True]]),
    }
    query = read_query(inputs, {}, DEFAULTS, TOKENIZER)
    assert (query.prompt, query.params.max_tokens, query.params.stop) == ("hi", 5, ("a", "b"))
    assert query.stream


def test_tritons_own_parameters_are_left_to_it() -> None:
    assert read({"id": "7", "triton_enable_empty_final_response": True}, request_id="7") == read()
    with pytest.raises(InvalidRequestError, match="unknown parameter 'id'"):
        read({"id": "8"}, request_id="7")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"parameters": {"top_q": 1}}, "unknown parameter 'top_q', given as a parameter of the re"),
        (
            {"sampling_parameters": given({"top_q": 1})},
            "unknown parameter 'top_q', given as one of",
        ),
        ({"parameters": {"text_output": 1}}, "known are allowed_token_ids, bad_words, "),
        ({"parameters": {"greedy": True}}, "unknown parameter 'greedy'"),
        ({"parameters": {"best_of": 4}}, "unknown parameter 'best_of'"),
        ({"sampling_parameters": strings("{")}, "is not a JSON object; write for example"),
        ({"sampling_parameters": strings('"x"')}, "is not a JSON object"),
        ({"sampling_parameters": strings("[" * 10_000)}, "is not a JSON object"),
        ({"sampling_parameters": strings("{}", "{}")}, "sampling_parameters has 2 elements"),
        ({"sampling_parameters": strings(b"\xff")}, "sampling_parameters is not UTF-8"),
        ({"stop_words": strings(b"\xff")}, "stop_words is not UTF-8"),
        ({"text": b"\xff"}, "text_input is not UTF-8"),
        ({"text_input": strings()}, "text_input has 0 elements; expected exactly one"),
        ({"text_input": strings("a", "b").reshape(2, 1)}, "text_input has 2 elements"),
        ({"beam_width": np.array([4], np.int32)}, "beam_width=4: there is no beam search; send 1"),
        ({"sampling_parameters": strings(" " * (1 << 20) + "{}")}, "has 1048578 bytes; this serv"),
        ({"parameters": {"temperature": "[" * 2_000_000}}, "temperature='"),
        ({"end_id": np.array([-1], np.int32)}, r"stop_token_ids.*was given as end_id"),
        ({"max_tokens": np.array([0], np.int32)}, "max_tokens=0 is not an integer of at least 1"),
        ({"max_tokens": np.array([1, 2], np.int32)}, "max_tokens has 2 elements"),
        ({"temperature": np.array([np.nan], np.float32)}, "temperature=nan is not a number"),
        ({"parameters": {"seed": -(2**63) - 1}}, "seed=-9223372036854775809 is not an integer in"),
        (
            {"parameters": {"random_seed": 2**64}},
            r"seed=18446744073709551616 .*\(seed was given as random_seed\)",
        ),
        ({"parameters": {"stop_words": 5}}, r"stop=5 .*\(stop was given as stop_words\)"),
        ({"parameters": {"min_p": "high"}}, "min_p='high' is not a number"),
        ({"parameters": {"temperature": "[1]"}}, r"temperature=\[1\] is not a number"),
        ({"parameters": {"temperature": "1" * 5000}}, "temperature='11"),
        ({"parameters": {"logit_bias": '{"x": 1}'}}, "logit_bias key='x' is not an integer"),
        ({"parameters": {"stream": 1}}, "stream=1 is not a boolean; send true or false"),
        ({"parameters": {"stream": "yes"}}, "stream='yes' is not a boolean"),
        ({"parameters": {"n": 10**9}}, "n=1000000000 is not an integer in"),
        ({"parameters": {"n": 129}}, "n=129 is more than this server gives; at most 128"),
        (
            {"parameters": {"logprobs": -1}},
            "logprobs=-1 is more than this server gives; at most 20",
        ),
        ({"parameters": {"prompt_logprobs": 1}}, "unknown parameter 'prompt_logprobs'"),
        ({"stop_words": strings(*map(str, range(65)))}, "stop_words has 65 elements; this"),
        ({"parameters": {"num_return_sequences": 0}}, "n=0 .*n was given as num_return_sequences"),
        ({"bad_words": strings("x" * 1001)}, "bad_words has a text of 1001 characters"),
        ({"parameters": {"temperature": 10**400}}, "temperature=1000"),
    ],
)
def test_what_is_wrong_is_named(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(**request_)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "0.1", "top_p": "0.95", "max_tokens": "100"},  # vLLM's sample client
        {"temperature": "0", "top_p": "1"},  # its tests
        {"temperature": "1", "n": "2", "stop": "x", "stream": "true"},
    ],
)
def test_what_a_tensor_says_and_a_parameter_repeats_is_read_once(values: dict[str, Any]) -> None:
    both = read(values, sampling_parameters=given(values))
    assert both == read(sampling_parameters=given(values)) == read(values)


def test_a_tensor_counts_where_a_parameter_of_the_request_says_otherwise() -> None:
    temperature = np.array([0.5], np.float32)
    parameters = {"temperature": 0.9, "seed": "x", "stream": "maybe", "top_p": 0.5}
    tensors: dict[str, Any] = {
        "temperature": temperature,
        "sampling_parameters": given({"seed": 3}),
    }
    query = read(parameters, stream=np.array([True]), **tensors)
    assert (query.params.temperature, query.params.seed) == (0.5, 3)
    assert query.stream and query.params.top_p == 0.5


@pytest.mark.parametrize(
    ("values", "inputs"),
    [
        ({"temperature": 0.5}, {"temperature": np.array([0.5], np.float32)}),
        ({"temperature": "0.5"}, {"temperature": np.array([0.5], np.float32)}),
        ({"seed": 7}, {"random_seed": np.array([7], np.uint64)}),
        ({"stop": "x"}, {"stop_words": strings("x", "")}),
        ({"stop_token_ids": [2]}, {"end_id": np.array([2], np.int32)}),
    ],
)
def test_equal_values_pass(values: dict[str, Any], inputs: dict[str, Any]) -> None:
    assert read(sampling_parameters=given(values), **inputs) == read(**inputs)


def test_two_values_of_one_parameter_are_refused() -> None:
    temperature = np.array([0.5], np.float32)
    with pytest.raises(InvalidRequestError) as error:
        read(temperature=temperature, sampling_parameters=given({"temperature": 0.6}))
    assert str(error.value) == (
        "temperature is given twice: as an input and as one of sampling_parameters; give it once"
    )
    with pytest.raises(InvalidRequestError) as error:
        read({"random_seed": 1, "seed": 2})
    assert str(error.value) == (
        "random_seed (given as a parameter of the request) and seed (given as a parameter of the "
        "request) are the same parameter; give one of them"
    )


def test_a_request_without_a_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as error:
        read_query({"max_tokens": np.array([3], np.int32)}, {}, DEFAULTS, TOKENIZER)
    assert str(error.value) == ("text_input is missing; send the prompt as one text, or messages")


def test_tables_agree_with_sampling_parameters() -> None:
    assert {tensor.field for tensor in SAMPLING.values()} <= FIELDS
    for name in INPUTS.keys() & FIELDS:
        assert SAMPLING[name].field == name
    assert not SWITCHES.keys() & FIELDS
