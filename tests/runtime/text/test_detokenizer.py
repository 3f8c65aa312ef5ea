"""Streaming text equals the text of all tokens at once, for any tokens, groups and stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.detokenizer import Detokenizer, StopMatcher
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings

SPECIAL = ["<s>", "<|end of text|>", "<\uff5cfin\u2581\uff5c>"]
WORDS = ["he", "llo", "world", "日", "本語", "é", "👩", "ÿ", "\n", "a", "b", "ab", "ba", "."]
SPLIT = ["日", "本", "👩"]


def tokenizer_of(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens(SPECIAL)
    # A lone Latin-1 character reads as a byte in a byte-level vocabulary, even when it was added.
    backend.add_tokens(["<plain added>", "ü"])
    return Tokenizer(backend, TokenizerSettings())


def byte_level() -> Tokenizer:
    """Each byte, whole words with and without a space, and tokens that end inside a character."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def written(text: str) -> str:
        return splitter.pre_tokenize_str(text)[0][0]

    pieces = sorted(splitter.alphabet())
    pieces += [written(text) for word in WORDS for text in (word, " " + word)]
    pieces += [half for char in SPLIT for half in (written(char)[:2], written(char)[1:])]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return tokenizer_of(backend)


def sentencepiece_vocabulary() -> dict[str, int]:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [text for word in WORDS for text in (word, "▁" + word)] + ["▁", "▁▁", "�"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def llama_like() -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(sentencepiece_vocabulary(), [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer_of(backend)


def gemma_like() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(sentencepiece_vocabulary(), [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer_of(backend)


def metaspace() -> Tokenizer:
    vocabulary = [(token, -float(i)) for token, i in sentencepiece_vocabulary().items()]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer_of(backend)


def words_only() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    return tokenizer_of(tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))


def nested(
    make: Callable[[], Tokenizer], wrap: Callable[[decoders.Decoder], decoders.Decoder]
) -> Callable[[], Tokenizer]:
    """The same tokenizer, its decoder a part of another."""

    def made() -> Tokenizer:
        backend = make()._backend
        assert backend.decoder is not None
        backend.decoder = wrap(backend.decoder)
        return Tokenizer(backend, TokenizerSettings())

    return made


def in_sequence(decoder: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Sequence([decoder])])


def before_strip(decoder: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoder, decoders.Strip(" ", 1, 0)])


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_level_in_sequence": nested(byte_level, in_sequence),
    "byte_level_before_strip": nested(byte_level, before_strip),
    "llama_like": llama_like,
    "gemma_like": gemma_like,
    "metaspace": metaspace,
    "words_only": words_only,
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


class Recording(Detokenizer):
    """Keeps the text that it gave out."""

    text = ""

    def append(self, token_ids: Sequence[int]) -> str:
        increment = super().append(token_ids)
        self.text += increment
        return increment

    def finish(self) -> str:
        end = super().finish()
        self.text += end
        return end


def stream(
    detokenizer: Detokenizer, ids: Sequence[int], sizes: Sequence[int]
) -> tuple[list[str], str]:
    """The increments when ``ids`` arrive in groups of ``sizes``, then one by one, and the end."""
    increments, start = [], 0
    for size in [*sizes, *([1] * len(ids))]:
        if start < len(ids):
            increments.append(detokenizer.append(ids[start : start + size]))
            start += size
    return increments, detokenizer.finish()


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Any ids, more often those that make trouble: special tokens and half characters."""
    everything = st.integers(0, tokenizer.vocab_size + 2)
    last = st.integers(max(0, tokenizer.vocab_size - 60), tokenizer.vocab_size - 1)
    return draw(st.lists(st.one_of(everything, last), max_size=25))


@kinds
@given(data=st.data(), skip=st.booleans())
@settings(deadline=None, max_examples=200)
def test_joined_increments_are_the_decoded_text(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(token_lists(tokenizer))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=6))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    detokenizer = Recording(tokenizer, SamplingParams(skip_special_tokens=skip))
    increments, end = stream(detokenizer, ids, sizes)
    assert "".join(increments) + end == whole
    assert detokenizer.text == whole
    assert detokenizer.finish() == ""
    assert not detokenizer.stopped
    assert detokenizer.num_tokens == len(ids)


@kinds
@given(text=st.text(alphabet="héllo 日本👩‍🚀\n", max_size=30))
@settings(deadline=None)
def test_characters_come_whole(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = [i for i in tokenizer.encode(text) if i]
    detokenizer = Recording(tokenizer, SamplingParams())
    for token in ids:
        assert "\ufffd" not in detokenizer.append([token])
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids)


def test_a_character_waits_for_its_last_byte_and_no_longer() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a👩b")
    assert len(ids) == 6
    detokenizer = Recording(tokenizer, SamplingParams())
    assert [detokenizer.append([i]) for i in ids] == ["a", "", "", "", "👩", "b"]
    cut = Recording(tokenizer, SamplingParams())
    assert cut.append(ids[:4]) == "a"
    assert cut.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["llama_like", "metaspace"])
def test_the_first_space_stays_after_a_prompt(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = [tokenizer.token_to_id(t) or 0 for t in ("<s>", "▁he", "llo", "<0x0A>", "<s>")]
    output = [tokenizer.token_to_id(t) or 0 for t in ("▁world", "▁he")]
    alone = Recording(tokenizer, SamplingParams())
    assert alone.append(output) == "world he"
    after = Recording(tokenizer, SamplingParams(), prompt)
    assert [after.append([i]) for i in output] == [" world", " he"]
    only_special = Recording(tokenizer, SamplingParams(), prompt[:1])
    assert only_special.append(output) == "world he"


@pytest.mark.parametrize("kind", ["llama_like", "gemma_like", "metaspace", "byte_level"])
@given(data=st.data())
@settings(deadline=None)
def test_text_after_a_prompt_continues_it(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    output = data.draw(token_lists(tokenizer))
    prompt = [tokenizer.token_to_id("a") or 0]
    detokenizer = Recording(tokenizer, SamplingParams(), prompt)
    detokenizer.append(output)
    detokenizer.finish()
    assert "a" + detokenizer.text == tokenizer.decode(prompt + output)


def expected_cut(text: str, stops: Sequence[str], keep: bool) -> tuple[str, str | None]:
    """Read character by character; the stop string that completes first ends the text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[:end] if keep else text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text(alphabet="ab. 日é�", min_size=1, max_size=4), min_size=1, max_size=3)


@kinds
@given(data=st.data(), stops=STOPS, keep=st.booleans())
@settings(deadline=None)
def test_stop_strings_cut_at_the_first_that_completes(
    kind: str, data: st.DataObject, stops: list[str], keep: bool
) -> None:
    tokenizer = TOKENIZERS[kind]
    names = ["a", "b", "ab", "ba", ".", "日", "▁", "▁a", "Ġ", "Ġa", "é", "<s>", "<0xE6>", "ë"]
    useful = [i for name in names if (i := tokenizer.token_to_id(name)) is not None]
    ids = data.draw(st.lists(st.sampled_from(useful), max_size=20))
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=6))
    params = SamplingParams(stop=stops, include_stop_str_in_output=keep)
    detokenizer = Recording(tokenizer, params)
    increments, end = stream(detokenizer, ids, sizes)
    text, reason = expected_cut(tokenizer.decode(ids), stops, keep)
    assert "".join(increments) + end == detokenizer.text == text
    assert detokenizer.stop_reason == reason
    assert detokenizer.stopped == (reason is not None)
    if detokenizer.stopped:
        assert detokenizer.append(useful) == "", "nothing follows a stop string"


class TestStopStrings:
    def run(self, text: str, stop: str, min_tokens: int = 0) -> tuple[list[str], str, Recording]:
        tokenizer = TOKENIZERS["byte_level"]
        params = SamplingParams(stop=stop, min_tokens=min_tokens)
        detokenizer = Recording(tokenizer, params)
        increments, end = stream(detokenizer, tokenizer.encode(text), [])
        return increments, end, detokenizer

    def test_only_a_possible_beginning_is_held_back(self) -> None:
        increments, end, _ = self.run("1<2</<a>", stop="</a>")
        assert increments == ["1", "", "<2", "", "", "</", "<a", ">"]
        assert end == ""

    def test_the_end_releases_what_was_held(self) -> None:
        increments, end, detokenizer = self.run("xEN", stop="END")
        assert (increments, end) == (["x", "", ""], "EN")
        assert detokenizer.text == "xEN"

    def test_the_token_that_stops_is_counted(self) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        detokenizer = Recording(tokenizer, SamplingParams(stop="lo"))
        assert detokenizer.append(tokenizer.encode("hello world")) == "hel"
        assert detokenizer.num_tokens == 5
        assert detokenizer.stop_reason == "lo"

    def test_text_before_min_tokens_is_exempt(self) -> None:
        _, _, detokenizer = self.run("ababab", stop="ab", min_tokens=3)
        assert detokenizer.text == "abab"
        assert detokenizer.num_tokens == 6
        assert detokenizer.stopped

    def test_overlapping_beginnings(self) -> None:
        _, _, detokenizer = self.run("xaaab!", stop="aab")
        assert detokenizer.text == "xa"


def test_long_runs_of_invalid_bytes_take_linear_time() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    invalid = next(i for i in range(256) if tokenizer.decode([i, i]) == "\ufffd\ufffd")
    detokenizer = Recording(tokenizer, SamplingParams())
    longest_wait = 0
    for count in range(1, 2000):
        detokenizer.append([invalid])
        longest_wait = max(longest_wait, count - len(detokenizer.text))
    assert longest_wait <= 3


@pytest.mark.real_model
def test_smollm2_streams_its_own_text(smollm2_gguf: Path, tmp_path: Path) -> None:
    import transformers

    truth = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    truth.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        ids = [
            rng.randrange(49152) if rng.random() < 0.5 else rng.randrange(300) for _ in range(40)
        ]
        for skip in (True, False):
            detokenizer = Recording(tokenizer, SamplingParams(skip_special_tokens=skip))
            detokenizer.append(ids)
            detokenizer.finish()
            assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)
            assert detokenizer.text == truth.decode(ids, skip_special_tokens=skip)


class Compared(str):
    """A stop string that counts how often it is looked at."""

    looks = 0

    def startswith(self, *arguments: Any) -> bool:  # noqa: ANN401
        Compared.looks += 1
        return super().startswith(*arguments)

    def __getitem__(self, index: Any) -> str:  # noqa: ANN401
        Compared.looks += 1
        return super().__getitem__(index)


def test_many_long_stop_strings_cost_a_token_a_look_each() -> None:
    stops = [Compared("a" * 999 + chr(0x100 + i)) for i in range(64)]
    matcher = StopMatcher(stops, keep=False)
    for text, tokens in (("a", 1500), ("ab", 50)):
        Compared.looks = 0
        for _ in range(tokens):
            matcher.feed(text)
        assert Compared.looks <= 1000 + tokens * len(stops)
    assert matcher.feed("a" * 998) == "" and matcher.feed("\u0105") == "a" * 998 + "\u0105"
    assert matcher.feed("a" * 1000 + "\u0105") == "a" and matcher.matched == stops[5]


def test_a_byte_level_decoder_is_known_inside_a_sequence() -> None:
    plain, nested = (TOKENIZERS[kind] for kind in ("byte_level", "byte_level_in_sequence"))
    halves = [plain.token_bytes(token) for token in range(plain.vocab_size)]
    assert [nested.token_bytes(token) for token in range(nested.vocab_size)] == halves
    assert any(half and not half.decode(errors="ignore") for half in halves), "half a character"
