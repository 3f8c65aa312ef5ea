from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import CompletionOutput, RequestMetrics, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_tokenizer
from slipstream.server.dynamo.requests import (
    Translator,
    cache_salt,
    counted_at_prefill,
    disaggregated_params,
    kv_transfer_params,
)

DEFAULTS = SamplingParams(temperature=0.3, top_k=7)
TRANSLATOR = Translator(DEFAULTS, counting_tokenizer())
# As Dynamo 1.6 sends it: what a client left out is null, or not there.
REQUEST: dict[str, Any] = {
    "token_ids": [0, 1, 2],
    "sampling_options": {"n": None, "temperature": 0.5, "top_p": None, "seed": 3},
    "stop_conditions": {
        "max_tokens": 9,
        "stop": ["x"],
        "stop_token_ids_hidden": [5],
        "min_tokens": None,
        "ignore_eos": True,
    },
    "output_options": {"logprobs": 2, "skip_special_tokens": True},
}

TAG = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}]}


def test_what_is_left_out_is_the_models_own() -> None:
    assert TRANSLATOR.params({"token_ids": [0]}) == DEFAULTS
    params = TRANSLATOR.params(REQUEST)
    assert (params.temperature, params.top_k, params.seed) == (0.5, 7, 3)
    assert (params.max_tokens, params.ignore_eos, params.logprobs) == (9, True, 2)
    assert params.stop_token_ids == (5,)
    assert params.stop == (), "the frontend looks for texts"


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"json": {"type": "object"}, "regex": None}, "json"),
        ({"choice": ["a", "b"]}, "choice"),
        ({"structural_tag": TAG}, "grammar"),
    ],
)
def test_forms_of_answers(form: dict[str, Any], kind: str) -> None:
    params = TRANSLATOR.params({"sampling_options": {"guided_decoding": form}})
    assert params.structured is not None and params.structured.kind == kind


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("output_options", {"logprobs": 21}, "logprobs is 21"),
        ("sampling_options", {"n": 2}, "n is 2"),
        ("sampling_options", {"temperature": -1}, "temperature"),
        ("sampling_options", {"guided_decoding": {"regex": "a", "choice": ["a"]}}, "one of"),
        ("sampling_options", {"guided_decoding": {"structural_tag": "{"}}, "is no JSON"),
    ],
)
def test_what_is_impossible_is_refused(part: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        TRANSLATOR.params({part: values})


def test_a_prompt_is_computed_for_another_worker_with_one_token() -> None:
    params = TRANSLATOR.prefill_params({**REQUEST, "stop_conditions": {"min_tokens": 4}})
    assert (params.max_tokens, params.min_tokens, params.stop_token_ids) == (1, 0, ())
    assert (params.temperature, params.top_k, params.seed) == (0.5, 7, 3)


def test_what_a_worker_says_of_its_pages_comes_to_the_next() -> None:
    said = disaggregated_params({"transfer_id": "a"})
    told = {"prefill_result": {"disaggregated_params": said, "prompt_tokens_details": None}}
    assert kv_transfer_params(told) == {"transfer_id": "a"}
    empty: list[dict[str, Any]] = [{}, {"prefill_result": None}, {"prefill_result": {}}]
    for nothing in empty:
        assert kv_transfer_params(nothing) is None


def test_what_was_handed_over_is_no_hit_of_the_cache() -> None:
    usage = {"prompt_tokens_details": {"cached_tokens": 9}}
    told = {"prefill_result": {"prompt_tokens_details": {"cached_tokens": 4}}}
    chunk = counted_at_prefill({"token_ids": [], "completion_usage": {**usage}}, told)
    assert chunk["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert counted_at_prefill({"completion_usage": usage}, {}) == {"completion_usage": usage}
    assert counted_at_prefill({"token_ids": [1]}, told) == {"token_ids": [1]}


def test_a_salt_is_told_as_routers_know_it() -> None:
    for salted in ({"nvext": {"cache_salt": "a"}}, {"extra_args": {"nvext": {"cache_salt": "a"}}}):
        assert cache_salt(salted) == "dynamo-cache-salt:a"
    assert cache_salt({"extra_args": None}) == ""


def delta(completion: CompletionOutput) -> RequestOutput:
    return RequestOutput(
        "x", None, [0, 1, 2], [completion], False, RequestMetrics(0), num_cached_tokens=2
    )


def test_a_chunk_has_what_is_new_and_the_last_one_counts() -> None:
    scored = TokenLogprobs(3, -0.5, 1, {3: (-0.5, 1), 4: (float("-inf"), 2)})
    chunk = TRANSLATOR.chunk(delta(CompletionOutput(0, "d", [3], logprobs=[scored])), 0)
    assert chunk["token_ids"] == [3] and chunk["index"] == 0 and "finish_reason" not in chunk
    assert chunk["log_probs"] == [-0.5]
    (top,) = chunk["top_logprobs"]
    ranked = [(each["rank"], each["token_id"], each["token"], each["logprob"]) for each in top]
    assert ranked == [(1, 3, "d", -0.5), (2, 4, "e", -9999.0)]

    ended = TRANSLATOR.chunk(delta(CompletionOutput(0, "e", [4], finish_reason="length")), 1)
    assert ended["finish_reason"] == "length"
    assert ended["completion_usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_an_aborted_request_is_cancelled() -> None:
    aborted = TRANSLATOR.chunk(delta(CompletionOutput(0, "", [], finish_reason="abort")), 0)
    assert aborted["finish_reason"] == "cancelled" and aborted["token_ids"] == []
