from __future__ import annotations

import math

from tests.server.small_tokenizers import byte_level, sentencepiece_like

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.testing import counting_tokenizer
from slipstream.server.core.logprobs import TokenTexts, by_token_id


def test_token_bytes_join_to_the_bytes_of_the_text() -> None:
    for tokenizer, ids, text in (
        (byte_level(), [0, 1, 2, 3, 4], "a bé<eos>"),
        (sentencepiece_like(), [0, 1, 2, 3, 4], " the foxesé"),
    ):
        texts = TokenTexts(tokenizer)
        assert bytes(b for i in ids for b in texts.bytes(i)).decode() == text
        assert texts.text(ids[2]) in ("\ufffd", "es")
        assert texts.text(10_000) == ""


def test_entries_by_token_id_name_the_token_and_hold_no_infinity() -> None:
    entry = TokenLogprobs(3, -math.inf, 7, {0: (-0.5, 1)})
    assert by_token_id(entry, TokenTexts(counting_tokenizer())) == {
        "3": {"logprob": -9999.0, "rank": 7, "decoded_token": "d"},
        "0": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
    }
