"""Stop strings that name special tokens."""

from __future__ import annotations

import gc
import weakref

import pytest
import tokenizers

from slipstream.runtime.llm import LLM
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import EOS, counting_engine
from slipstream.runtime.text.detokenizer import Detokenizer
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings

SPECIAL = ("<end>", "<turn>", "<end>s")
VOCAB = ("a", "b", "<", "end", ">")


def tokenizer() -> Tokenizer:
    """Letters, the pieces of a special token's name, and special tokens from 5 on."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="a")
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, TokenizerSettings())


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "reason"),
    [
        (["<end>"], [0, 5, 1], "a", "<end>"),
        (["<end>"], [0, 6, 1], "ab", None),
        (["<end>"], [0, 2, 3, 4, 1], "a", "<end>"),  # spelt
        (["b<end>"], [0, 1, 5], "a", "b<end>"),
        (["b<end>"], [0, 5, 1], "ab", None),
        (["<end>b", "zz"], [0, 5, 0, 5, 1], "aa", "<end>b"),
        (["<end><turn>"], [0, 5, 6, 1], "a", "<end><turn>"),
        (["<end>s"], [0, 7, 1], "a", "<end>s"),
        (["<turn>", "b"], [0, 6, 1], "a", "<turn>"),
    ],
)
def test_a_special_token_in_a_stop_string_stops(
    stop: list[str], tokens: list[int], text: str, reason: str | None
) -> None:
    for keep in (False, True):
        params = SamplingParams(stop=stop, include_stop_str_in_output=keep)
        found = Detokenizer(tokenizer(), params)
        got = "".join(found.append([token]) for token in tokens) + found.finish()
        assert got == text + (reason or "" if keep else "")
        assert found.stop_reason == reason


def test_it_is_not_seen_before_min_tokens() -> None:
    found = Detokenizer(tokenizer(), SamplingParams(stop=["<end>"], min_tokens=2))
    assert found.append([0, 5, 0, 5]) == "aa" and found.stop_reason == "<end>"


def test_it_ends_a_request() -> None:
    with LLM.from_engine(counting_engine()) as llm:
        params = SamplingParams(temperature=0, ignore_eos=True, stop=["<eos>"], max_tokens=9)
        (output,) = llm.generate([[EOS - 3]], params)
    (completion,) = output.outputs
    assert (completion.text, completion.finish_reason) == ("_\n", "stop")
    assert completion.stop_reason == "<eos>" and completion.token_ids[-1] == EOS


def test_a_tokenizer_is_not_kept_after_its_engine() -> None:
    given = tokenizer()
    Detokenizer(given, SamplingParams(stop=["<end>"]))
    kept = weakref.ref(given)
    del given
    gc.collect()
    assert kept() is None
