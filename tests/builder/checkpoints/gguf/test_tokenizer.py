"""Tokenizers from GGUF metadata, against those of transformers and SentencePiece's definition."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GemmaTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from slipstream.builder.checkpoints.gguf.special_tokens import end_token_ids
from slipstream.builder.checkpoints.gguf.tokenizer import build_tokenizer, tokenizer_config
from slipstream.builder.checkpoints.gguf.words import WORDS
from slipstream.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 2024 and they'll've seen 1234567 of them.",
    "def f(x):\n    return x ** 2  # 100 %\n\n\tvalues = [1, 22, 333]\n",
    "Größe, naïve café, 你好、世界。今天是2024年 😀👩‍👩‍👧 привет мир",
] * 3
TEXTS = [
    *CORPUS[:3],
    "",
    " ",
    "   leading and trailing   ",
    "a  b   c\t\td\n\n\ne\r\n\r\nf",
    "x =  1\n  22   333",
    "DON'T SHOUT'S We'Re",
    "e\u0301 is not \u00e9 until composed",
    "½ ² ٣ \uff11\uff12\uff13",
    "unseen 龍 ☃ \U0001f9ff",
    "<|im_start|>user\nHi<|im_end|>\n<think>why</think>",
    "a<|im_end|> b <|im_end|>c",
]


@pytest.fixture(name="byte_level", scope="module")
def byte_level_metadata() -> dict[str, Any]:
    """A small byte-level vocabulary as GGUF metadata."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = by_id(tokenizer)
    marked = ["<|im_start|>", "<|im_end|>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary + marked,
        "tokenizer.ggml.token_type": [NORMAL] * len(vocabulary) + [CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": merges_of(tokenizer),
        "tokenizer.ggml.bos_token_id": len(vocabulary),
        "tokenizer.ggml.eos_token_id": len(vocabulary) + 1,
    }


def by_id(tokenizer: Tokenizer) -> list[str]:
    return [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def merges_of(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def of_transformers(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that transformers makes of the same metadata."""
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    renamed = {names.get(key, key): value for key, value in given.items()}
    tokenizer, _ = convert_gguf_tokenizer("llama", renamed)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


# Whose own tokenizers compose characters first, which their GGUF twins in transformers do not.
COMPOSED = ("qwen2", "deepseek-r1-qwen", "qwen35")
OF_TRANSFORMERS = (
    "gpt-2", "llama-bpe", "llama3", "falcon3", "pixtral", "dbrx", "smaug-bpe", "tekken", "megrez",
    "gpt-4o", "llama4", *COMPOSED,
)  # fmt: skip


@pytest.mark.parametrize("pre", OF_TRANSFORMERS)
def test_words_are_split_as_in_transformers(byte_level: dict[str, Any], pre: str) -> None:
    metadata = byte_level | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    ours, theirs = build_tokenizer(metadata), of_transformers(metadata)

    for text in TEXTS:
        same = theirs.encode(text.replace("e\u0301", "\u00e9") if pre in COMPOSED else text)
        assert ours.encode(text).ids == same.ids
        assert ours.decode(same.ids, skip_special_tokens=False) == theirs.decode(
            same.ids, skip_special_tokens=False
        )


SAMPLE = "It's 12345 CamelCase,\n\n  x\u3000日本語ひらがな! Ünder"
# What llama.cpp makes of it by the expressions that it has for the name.
SPLITS = {
    "default": "It|'|s| |123|45| CamelCase|,|\n\n | x|\u3000|日本語ひらがな|!| Ünder",
    "falcon": "It|'|s| |123|45| CamelCase|,|\n\n | x|\u3000|日本語ひらがな|!| Ünder",
    "deepseek-llm": "It|'|s| |12345| CamelCase|,|\n|\n| | x|\u3000|日本語ひらがな|!| Ü|nder",
    "deepseek-coder": "It|'|s| |1|2|3|4|5| CamelCase|,|\n|\n| | x|\u3000日本語ひらがな|!| Ünder",
    "deepseek-v3": "It|'s| |123|45| CamelCase|,\n\n| | x|\u3000|日本語ひらがな|!| Ünder",
    "exaone": "It|'s| |1|2|3|4|5| CamelCase|,|\n\n | x|\u3000|日本語ひらがな|!| Ünder",
    "bloom": "It's| 12345| CamelCase|,\n\n | x|\u3000|日本語ひらがな|!| Ünder",
    "viking": "It's| |1|2|3|4|5| CamelCase|,\n\n | x|\u3000|日本語ひらがな|!| Ünder",
    "superbpe": "It's |12|345| CamelCase,\n\n  x\u3000日本語ひらがな! Ünder",
    "tiny_aya": "It's| |12|345| Camel|Case|,\n\n| | x|\u3000日本語ひらがな|!| Ünder",
    "afmoe": "It|'s| |12|345| CamelCase|,\n\n| | x|\u3000|日本語ひらがな|!| Ünder",
    "bailingmoe": "It|'s| |1|2|3|4|5| CamelCase|,\n\n| | x|\u3000日本語ひらがな|!| Ünder",
    "minicpm5": "It|'s| |123|45| CamelCase|,\n\n| | x|\u3000日本語ひらがな|!| Ünder",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_words_are_split_as_in_llama_cpp(pre: str) -> None:
    steps = [pre_tokenizers.Split(Regex(each), "isolated") for each in WORDS[pre].patterns]
    found = pre_tokenizers.Sequence(steps).pre_tokenize_str(SAMPLE)
    assert "|".join(word for word, _ in found) == SPLITS[pre]


@pytest.mark.parametrize("pre", WORDS)
def test_every_way_of_splitting_loses_nothing(byte_level: dict[str, Any], pre: str) -> None:
    tokenizer = build_tokenizer(byte_level | {"tokenizer.ggml.pre": pre})
    for text in [*TEXTS, SAMPLE]:
        whole = unicodedata.normalize("NFC", text) if pre in COMPOSED else text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == whole


def test_without_a_name_what_is_assumed_is_said(
    byte_level: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    named = build_tokenizer(byte_level | {"tokenizer.ggml.pre": "default"})
    assert not caplog.messages

    assumed = build_tokenizer(byte_level | {"tokenizer.ggml.pre": None})

    assert assumed.to_str() == named.to_str()
    (warning,) = caplog.messages
    assert "no tokenizer.ggml.pre" in warning and "'default' is assumed" in warning
    assert "gguf-new-metadata --pre-tokenizer" in warning


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|eot_id|>", "a", "<|eom_id|>"], {0, 2}),
        (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], {0, 1}),
        (["<end_of_turn>", "<start_of_turn>"], {0}),
        (["<|end|>", "<|return|>", "<|call|>"], {1, 2}),
        (["</s>", "[PAD]"], set()),
    ],
)
def test_ends_of_a_turn_are_known_by_their_names(
    byte_level: dict[str, Any], tokens: list[str], ends: set[int]
) -> None:
    words = byte_level["tokenizer.ggml.tokens"][:-3]
    first = len(words)
    plain = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*words, *tokens],
        "tokenizer.ggml.token_type": [NORMAL] * (first + len(tokens)),
        "tokenizer.ggml.merges": byte_level["tokenizer.ggml.merges"],
    }

    assert set(end_token_ids(plain)) == {first + index for index in ends}
    tokenizer = build_tokenizer(plain)
    for index in ends:
        assert tokenizer.encode(tokens[index]).ids == [first + index]
        assert tokenizer.decode([first + index]) == "", "it is special, whatever its type"


def test_sentencepiece_has_its_usual_tokens_where_the_file_names_none(
    pieces: dict[str, Any],
) -> None:
    unnamed = {key: value for key, value in pieces.items() if not key.endswith("_token_id")}

    assert build_tokenizer(unnamed).to_str() == build_tokenizer(pieces).to_str()
    assert end_token_ids(unnamed) == [2]
    assert tokenizer_config(unnamed) == tokenizer_config(pieces)


def test_ids_outside_the_vocabulary_are_ignored(byte_level: dict[str, Any]) -> None:
    outside = {"tokenizer.ggml.bos_token_id": 10**6, "tokenizer.ggml.add_bos_token": True}
    assert build_tokenizer(byte_level | outside).encode("a").tokens == ["a"]
    assert "bos_token" not in tokenizer_config(byte_level | outside)


def test_smollm_splits_every_digit_before_the_spaces(byte_level: dict[str, Any]) -> None:
    ours = build_tokenizer(byte_level | {"tokenizer.ggml.pre": "smollm"})
    theirs = of_transformers(byte_level)
    # The pre-tokenizer in the tokenizer.json of SmolLM and SmolLM2.
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )

    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.encode("x =  12").tokens[-3:] == ["ĠĠ", "1", "2"]


def test_a_whole_word_of_the_vocabulary_needs_no_merges(byte_level: dict[str, Any]) -> None:
    tokens = [*byte_level["tokenizer.ggml.tokens"], "zyxwv"]
    types = [*byte_level["tokenizer.ggml.token_type"], NORMAL]
    metadata = byte_level | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}

    merged = build_tokenizer(metadata).encode("zyxwv").tokens
    whole = build_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("zyxwv").tokens

    assert len(merged) > 1
    assert whole == ["<|im_start|>", "zyxwv"]


def test_marked_tokens_stay_whole_and_only_control_is_special(byte_level: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(byte_level)

    ids = tokenizer.encode("<|im_start|>a<think>").ids

    assert [tokenizer.id_to_token(i) for i in ids] == ["<|im_start|>", "a", "<think>"]
    assert tokenizer.decode(ids) == "a<think>"
    assert tokenizer.get_vocab_size() == len(byte_level["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["a"]),
        ({"add_bos_token": True}, ["<|im_start|>", "a"]),
        ({"add_eos_token": True}, ["a", "<|im_end|>"]),
        ({"pre": "llama-bpe"}, ["<|im_start|>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
    ],
)
def test_begin_and_end_tokens(
    byte_level: dict[str, Any], flags: dict[str, Any], expected: list[str]
) -> None:
    metadata = byte_level | {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    tokenizer = build_tokenizer(metadata)

    assert tokenizer.encode("a").tokens == expected
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


def test_transformers_loads_what_is_written(byte_level: dict[str, Any], tmp_path: Path) -> None:
    metadata = byte_level | {"tokenizer.ggml.pre": "llama-bpe"}
    ours = build_tokenizer(metadata)
    ours.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(metadata)))

    theirs = AutoTokenizer.from_pretrained(tmp_path)

    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).ids


@pytest.fixture(name="pieces", scope="module")
def sentencepiece_metadata() -> dict[str, Any]:
    """A small SentencePiece vocabulary as GGUF metadata: no merges, a score for each piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator([text[:40] for text in CORPUS], trainer)
    learned = by_id(tokenizer)
    single = [piece for piece in learned if len(piece) == 1]
    longer = [piece for piece in learned if len(piece) > 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *longer, *single]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(learned)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(learned))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def best_pair_first(metadata: dict[str, Any], text: str) -> list[str]:
    """SentencePiece by its definition: join the two neighbours whose join scores best, repeat."""
    scores = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (scores[left + right], -i)
            for i, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    bytes_of = {part: [f"<0x{b:02X}>" for b in part.encode()] for part in parts}
    return [token for part in parts for token in ([part] if part in scores else bytes_of[part])]


def test_sentencepiece_joins_the_best_pair_first(pieces: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(pieces)

    for text in TEXTS:
        if text:
            found = tokenizer.encode(text, add_special_tokens=False)
            assert found.tokens == best_pair_first(pieces, text)
            assert tokenizer.decode(found.ids) == text


def test_sentencepiece_is_that_of_transformers(pieces: dict[str, Any]) -> None:
    ours, theirs = build_tokenizer(pieces), of_transformers(pieces)

    for text in TEXTS:
        if not text.startswith(" "):  # transformers adds no space there; llama.cpp does
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, add_special_tokens=False).ids == expected


def test_gemma4_is_that_of_transformers(pieces: dict[str, Any]) -> None:
    """No space before a text, and merges of the file that may join across lines."""
    model = json.loads(build_tokenizer(pieces).to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    of_file = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": merges}
    ours = build_tokenizer(pieces | of_file)
    pairs: Any = [tuple(pair) for pair in model["merges"]]
    theirs = GemmaTokenizer(vocab=model["vocab"], merges=pairs, bos_token="<s>", eos_token="</s>")

    for text in (*TEXTS, "two\n\nlines and\n more"):
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(found) == text


def test_sentencepiece_adds_begin_and_spaces_as_llama_cpp_does(pieces: dict[str, Any]) -> None:
    spaced = build_tokenizer(pieces)
    plain = build_tokenizer(pieces | {"tokenizer.ggml.add_space_prefix": False})

    assert spaced.encode("q</s>q").tokens == ["<s>", "▁", "q", "</s>", "▁", "q"]
    assert plain.encode("q</s>q").tokens == ["<s>", "q", "</s>", "q"]
    assert plain.decode(plain.encode(" q").ids) == " q"


def test_merges_of_the_file_are_preferred(pieces: dict[str, Any]) -> None:
    piece = next(token for token in pieces["tokenizer.ggml.tokens"][259:] if len(token) == 2)
    tokenizer = build_tokenizer(pieces | {"tokenizer.ggml.merges": [" ".join(piece)]})
    texts = {text: tokenizer.encode(text, add_special_tokens=False).tokens for text in TEXTS}

    made = {token for tokens in texts.values() for token in tokens if not token.startswith("<0x")}
    assert {token for token in made if len(token) > 1} - {"<s>", "</s>"} == {piece}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'.*expected one of gpt2, llama"),
        ({"model": None}, "tokenizer.ggml.model is 'None'"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2'.*llama-bpe"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": ["a b", "a qqq"]}, "merges has 'a (b|qqq)'"),
        ({"token_type": [1, 1]}, "tokens and 2 token types"),
        ({"model": "llama", "merges": None}, "no merges and no score for each"),
    ],
)
def test_a_vocabulary_that_cannot_be_rebuilt_is_refused(
    byte_level: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    metadata = byte_level | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}

    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(metadata)
