"""Texts that cannot fit are refused by their size; encoding leaves the interpreter to others."""

from __future__ import annotations

import sys
import threading
import time
from itertools import count

import pytest
import tokenizers
from tests.server.small_tokenizers import byte_level
from tokenizers import decoders, models, normalizers, pre_tokenizers

from slipstream.errors import InvalidRequestError
from slipstream.runtime.request_factory import RequestFactory
from slipstream.runtime.testing import counting_engine
from slipstream.runtime.text.length import check_length
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings

TEXTS = [
    "",
    "a",
    "ab " * 50,
    "é" * 40,
    "e\u0301" * 40,
    "\u1100\u1161\u11a8" * 30,
    "👩‍👩‍👧" * 20,
    "<|end|>",
]


def of_bytes(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """GPT-2's kind, with two merges and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab", "abab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "ab")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, TokenizerSettings())


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_a_text_has_at_least_as_many_tokens_as_its_length_tells(
    normalizer: normalizers.Normalizer | None,
) -> None:
    tokenizer = of_bytes(normalizer)
    for text in TEXTS:
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text)), text
    assert of_bytes().least_tokens("ab" * 700) == 200  # of "<|end|>", the longest
    assert byte_level().least_tokens("a\ud800") == 0


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = counting_engine()

    def encode(*_: object, **__: object) -> list[int]:
        raise AssertionError("encoded in vain")

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    with pytest.raises(InvalidRequestError, match=r"at least 838860 tokens; .* takes 1 to 255 "):
        RequestFactory(engine).request("a" * (4 << 20), None, output_kind="final")
    check_length(engine.tokenizer, ["a" * 700, "b" * 500], 256)
    with pytest.raises(InvalidRequestError, match="at least 280 tokens"):
        check_length(engine.tokenizer, ["a" * 700] * 2, 256)


def test_encoding_leaves_the_interpreter_to_others() -> None:
    """Another thread goes on while a long text is encoded; holding the lock, it would stand still
    between the two looks."""
    tokenizer, beats, ended = of_bytes(), count(), threading.Event()
    ticks = 0

    def beat() -> None:
        nonlocal ticks
        while not ended.is_set():
            ticks = next(beats)
            time.sleep(0)  # gives the lock away

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        sys.setswitchinterval(60)  # nobody but who gives the lock away lets others go on
        during = 0
        for _ in range(1000):  # other programs may have the cores meanwhile
            before = ticks
            tokenizer.encode("ab cd " * 10_000)
            during = ticks - before
            if during > 50:
                break
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    assert during > 50, during
