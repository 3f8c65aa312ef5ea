"""Where tokens begin in the text of a completion."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from tests.server.openai.serving import Running
from tests.server.small_tokenizers import byte_level, sentencepiece_like

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.detokenizer import Detokenizer
from slipstream.runtime.text.offsets import TextOffsets
from slipstream.runtime.text.stream import byte_level_alphabet
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.openai.scored_tokens import ScoredTokens


def offsets(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[int]:
    stream = tokenizer.text_stream(skip_special_tokens=True, prompt=prompt)
    places = TextOffsets(stream, 0)
    return [places.take(token) for token in tokens]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0, 1, 0], [0, 1, 3]),  # "a b" "a"
        ([0, 2, 3, 0], [0, 1, 1, 2]),  # the parts of é
        ([2, 3, 2, 3], [0, 0, 1, 1]),
        ([2, 0, 0], [0, 1, 2]),  # half a character is U+FFFD
        ([0, 4, 0], [0, 1, 1]),  # a special token adds nothing
        ([2, 4, 3, 0], [0, 0, 0, 1]),
    ],
)
def test_offsets_of_byte_level_tokens(tokens: list[int], expected: list[int]) -> None:
    assert offsets(byte_level(), tokens) == expected


@pytest.mark.parametrize(
    ("tokens", "prompt", "expected"),
    [
        ([0, 1, 2], [], [0, 3, 7]),  # a text does not begin with a space
        ([0, 1, 2], [2], [0, 4, 8]),  # what goes on does
        ([3, 4, 3, 4, 2], [], [0, 0, 1, 1, 2]),
        ([2, 3, 0], [], [0, 2, 3]),  # half a character is U+FFFD
    ],
)
def test_offsets_of_sentencepiece_tokens(
    tokens: list[int], prompt: list[int], expected: list[int]
) -> None:
    assert offsets(sentencepiece_like(), tokens, prompt) == expected


def bytes_tokenizer() -> Tokenizer:
    """A token a byte."""
    vocab = byte_level_alphabet()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, TokenizerSettings())


@pytest.mark.parametrize("stops", [(), ("b狐",), ("aa", "é")])
def test_a_stream_tells_what_an_answer_in_one_piece_tells(stops: tuple[str, ...]) -> None:
    tokenizer, draw = bytes_tokenizer(), random.Random(5)
    texts = TokenTexts(tokenizer)
    for _ in range(60):
        written = "".join(draw.choices("abé狐🦊", k=8))
        ids = list(written.encode())[: draw.randrange(4, 30)]
        pieces = Detokenizer(tokenizer, SamplingParams(stop=stops))
        streamed = ScoredTokens(
            texts, TextOffsets(tokenizer.text_stream(skip_special_tokens=True), 0)
        )
        told: dict[str, list[Any]] = {}
        text, taken = "", 0
        for taken, token in enumerate(ids, 1):
            streamed.add([token], [TokenLogprobs(token, -1.0, 1, {})])
            piece = pieces.append([token])
            last = pieces.stopped or taken == len(ids)
            piece += pieces.finish() if last else ""
            text += piece
            for name, values in (streamed.tell(piece, last=last) or {}).items():
                told.setdefault(name, []).extend(values)
            if last:
                break
        whole = ScoredTokens(texts, TextOffsets(tokenizer.text_stream(skip_special_tokens=True), 0))
        whole.add(ids[:taken], [TokenLogprobs(token, -1.0, 1, {}) for token in ids[:taken]])
        assert whole.tell(text, last=True) == told
        places = told["text_offset"]
        assert places == sorted(places) and all(place <= len(text) for place in places)
        for place, token in zip(places, told["tokens"], strict=True):
            if token != "\ufffd" and place < len(text):
                assert text.startswith(str(token), place)


def test_offsets_of_a_prompt_are_those_of_its_text() -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "the": 1, "fox": 2, "?": 3}, unk_token="?")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", 0)]
    )
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, TokenizerSettings())
    # BOS, "the", " fox", and what stands behind it
    assert tokenizer.offsets("the fox") == [0, 0, 3, 7]


def test_a_held_back_stop_string_ends_where_the_text_does(server: Running) -> None:
    body = {"prompt": "abc", "logprobs": 0, "stop": ["gh"], "max_tokens": 9, "echo": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "abcdef"
    assert choice["logprobs"]["tokens"] == list("abcdefgh")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6]
