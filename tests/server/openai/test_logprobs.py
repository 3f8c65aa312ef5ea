from __future__ import annotations

import math

import tokenizers

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.testing import counting_tokenizer
from slipstream.runtime.text.tokenizer import Tokenizer, TokenizerSettings
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.openai.logprobs import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)


def byte_level() -> Tokenizer:
    """GPT-2's kind: a token is some bytes, maybe half a character."""
    vocab = {"a": 0, "Ġb": 1, "Ã": 2, "©": 3, "<eos>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, TokenizerSettings())


def sentencepiece_like() -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, bytes that are in no token by their own names."""
    vocab = {"▁the": 0, "▁fox": 1, "es": 2, "<0xC3>": 3, "<0xA9>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="es"))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, TokenizerSettings())


def test_token_bytes_join_to_the_bytes_of_the_text() -> None:
    for tokenizer, ids, text in (
        (byte_level(), [0, 1, 2, 3, 4], "a bé<eos>"),
        (sentencepiece_like(), [0, 1, 2, 3, 4], " the foxesé"),
    ):
        texts = TokenTexts(tokenizer)
        assert bytes(b for i in ids for b in texts.bytes(i)).decode() == text
        assert texts.text(ids[2]) in ("\ufffd", "es")
        assert texts.text(10_000) == ""


def entry(token: int, logprob: float, top: dict[int, tuple[float, int]]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, 7, top)


def test_the_token_itself_is_always_named() -> None:
    texts = TokenTexts(counting_tokenizer())
    scores = [None, entry(3, -2.0, {0: (-0.5, 1), 1: (-0.75, 2)})]
    shape = completion_logprobs([1, 3], scores, texts, 10)
    assert shape == {
        "text_offset": [10, 11],
        "token_logprobs": [None, -2.0],
        "tokens": ["b", "d"],
        "top_logprobs": [None, {"d": -2.0, "a": -0.5, "b": -0.75}],
    }
    assert prompt_logprobs(scores, texts)[1] == {
        "3": {"logprob": -2.0, "rank": 7, "decoded_token": "d"},
        "0": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        "1": {"logprob": -0.75, "rank": 2, "decoded_token": "b"},
    }


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    texts = TokenTexts(byte_level())
    shape = completion_logprobs([2], [entry(2, -3.0, {3: (-1.0, 1)})], texts, 0)
    assert shape["top_logprobs"] == [{"\ufffd": -1.0}]


def test_what_cannot_happen_is_a_number_in_json() -> None:
    texts = TokenTexts(counting_tokenizer())
    impossible = entry(0, -math.inf, {1: (-math.inf, 2)})
    content = chat_logprobs([impossible], texts)["content"][0]
    assert content["logprob"] == content["top_logprobs"][0]["logprob"] == -9999.0
