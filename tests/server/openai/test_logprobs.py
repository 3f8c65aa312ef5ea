from __future__ import annotations

import math

from tests.server.small_tokenizers import byte_level

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.testing import counting_tokenizer
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.openai.logprobs import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)


def entry(token: int, logprob: float, top: dict[int, tuple[float, int]]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, 7, top)


def test_the_token_itself_is_always_named() -> None:
    texts = TokenTexts(counting_tokenizer())
    scores = [None, entry(3, -2.0, {0: (-0.5, 1), 1: (-0.75, 2)})]
    shape = completion_logprobs([1, 3], scores, [10, 11], texts)
    assert shape == {
        "text_offset": [10, 11],
        "token_logprobs": [None, -2.0],
        "tokens": ["b", "d"],
        "top_logprobs": [None, {"d": -2.0, "a": -0.5, "b": -0.75}],
    }
    assert prompt_logprobs(scores, texts) == [
        None,
        {
            "3": {"logprob": -2.0, "rank": 7, "decoded_token": "d"},
            "0": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "1": {"logprob": -0.75, "rank": 2, "decoded_token": "b"},
        },
    ]


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    texts = TokenTexts(byte_level())
    shape = completion_logprobs([2], [entry(2, -3.0, {3: (-1.0, 1)})], [0], texts)
    assert shape["top_logprobs"] == [{"\ufffd": -1.0}]


def test_what_cannot_happen_is_a_number_in_json() -> None:
    texts = TokenTexts(counting_tokenizer())
    impossible = entry(0, -math.inf, {1: (-math.inf, 2)})
    content = chat_logprobs([impossible], texts)["content"][0]
    assert content["logprob"] == content["top_logprobs"][0]["logprob"] == -9999.0
