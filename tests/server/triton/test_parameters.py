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
from slipstream.server.triton.interface import INPUTS, OUTPUTS, SAMPLING, SWITCHES
from slipstream.server.triton.parameters import Query, read_query

DEFAULTS = SamplingParams(temperature=0.6, top_k=40)


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
    return read_query(
        {"text_input": strings(text), **inputs}, parameters or {}, DEFAULTS, request_id
    )


def given(values: dict[str, Any]) -> NDArray[Any]:
    """The input ``sampling_parameters``."""
    return strings(json.dumps(values))


def test_what_is_not_said_is_the_models_default() -> None:
    assert read() == Query("hi", DEFAULTS, stream=False, echo=True, returns=frozenset())


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
    )


FIELDS = {field.name for field in dataclasses.fields(SamplingParams) if field.init}


@pytest.mark.parametrize("field", sorted(FIELDS - {"prompt_logprobs"}))
def test_every_sampling_parameter_can_be_given_as_json_and_as_a_request_parameter(
    field: str,
) -> None:
    values: dict[str, Any] = {
        "n": 2, "max_tokens": 7, "min_tokens": 1, "temperature": 0.25, "top_k": 3, "top_p": 0.5,
        "min_p": 0.125, "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -1,
        "seed": 5, "stop": ["x", "y"], "stop_token_ids": [4], "include_stop_str_in_output": True,
        "ignore_eos": True, "logit_bias": {"5": -2.5}, "allowed_token_ids": [1, 2],
        "bad_words": ["z"], "bad_words_token_ids": [[1, 2]], "logprobs": 3,
        "skip_special_tokens": False,
    }  # fmt: skip
    base = {name: getattr(DEFAULTS, name) for name in values}
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
    assert read(sampling_parameters=given({"temperature": None, "stop": None})).params == DEFAULTS
    assert read(sampling_parameters=strings("")).params == DEFAULTS
    assert read(stop_words=strings(""), bad_words=strings("", "")).params == DEFAULTS
    assert read(bad_words=np.array([], np.object_)).params == DEFAULTS


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


def test_flags_choose_outputs_and_logprobs_are_computed_for_them() -> None:
    for name in OUTPUTS.keys() - {"text_output"}:
        assert f"return_{name}" in SWITCHES
        assert read({f"return_{name}": True}).returns == {name}
        assert read({f"return_{name}": False}).returns == frozenset()
    assert read({"return_num_input_tokens": True}).params.logprobs is None
    assert read({"return_cumulative_logprob": True}).params.logprobs == 0
    assert read({"return_logprobs": True, "logprobs": 4}).params.logprobs == 4


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
        ({"sampling_parameters": strings("{")}, "is not a JSON object; write for example"),
        ({"sampling_parameters": strings('"x"')}, "is not a JSON object"),
        ({"sampling_parameters": strings("[" * 10_000)}, "is not a JSON object"),
        ({"sampling_parameters": strings("{}", "{}")}, "sampling_parameters has 2 elements"),
        ({"sampling_parameters": strings(b"\xff")}, "sampling_parameters is not UTF-8"),
        ({"stop_words": strings(b"\xff")}, "stop_words is not UTF-8"),
        ({"text": b"\xff"}, "text_input is not UTF-8"),
        ({"text_input": strings()}, "text_input has 0 elements; expected exactly one"),
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
        ({"stop_words": strings(*map(str, range(65)))}, "stop has 65 entries; .*stop_words"),
        ({"bad_words": strings("x" * 1001)}, "bad_words has a text of 1001 characters"),
        ({"parameters": {"temperature": 10**400}}, "temperature=1000"),
    ],
)
def test_what_is_wrong_is_named(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(**request_)


def test_a_parameter_given_twice_is_refused() -> None:
    temperature = np.array([0.5], np.float32)
    with pytest.raises(InvalidRequestError) as error:
        read(temperature=temperature, sampling_parameters=given({"temperature": 0.5}))
    assert str(error.value) == (
        "temperature is given twice: as an input and as one of sampling_parameters; give it once"
    )
    with pytest.raises(InvalidRequestError) as error:
        read({"seed": 1}, random_seed=np.array([1], np.uint64))
    assert str(error.value) == (
        "random_seed (given as an input) and seed (given as a parameter of the request) are the "
        "same parameter; give one of them"
    )


def test_tables_agree_with_sampling_parameters() -> None:
    assert {tensor.field for tensor in SAMPLING.values()} <= FIELDS
    for name in INPUTS.keys() & FIELDS:
        assert SAMPLING[name].field == name
    assert not SWITCHES.keys() & FIELDS
