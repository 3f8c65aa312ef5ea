"""The tokenizer in a GGUF file's metadata as a ``tokenizers`` tokenizer.

Two kinds of vocabulary occur in the supported architectures: byte-level BPE (``gpt2``), whose way
of splitting text into words is known by name only, and SentencePiece BPE (``llama``). Sources: the
tokenizer.json files of the models themselves and llama-vocab.cpp of llama.cpp, which defines what
the names mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gguf.constants import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from slipstream.errors import CheckpointError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Words:
    """How a byte-level vocabulary splits text; no ``pattern`` means GPT-2's own.

    ``whole_words`` looks a word up before merging, as tiktoken does.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_GPT2_WORDS = _Words()
_DIGIT_WORDS = _Words(single_digits=True)
_LLAMA3_WORDS = _Words(_LLAMA3, whole_words=True, add_bos=True)
_QWEN2_WORDS = _Words(_QWEN2, nfc=True)
_WORDS: Mapping[str, _Words] = MappingProxyType(
    {
        "default": _GPT2_WORDS,
        "gpt-2": _GPT2_WORDS,
        "smollm": _DIGIT_WORDS,
        "starcoder": _DIGIT_WORDS,
        "refact": _DIGIT_WORDS,
        "llama-bpe": _LLAMA3_WORDS,
        "llama3": _LLAMA3_WORDS,
        "llama-v3": _LLAMA3_WORDS,
        "qwen2": _QWEN2_WORDS,
        "deepseek-r1-qwen": _QWEN2_WORDS,
        "tekken": _Words(_TEKKEN, whole_words=True, add_bos=True),
    }
)


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that ``tokenizer.ggml.*`` describes.

    Raises CheckpointError for a kind of vocabulary or word splitting that is not known: a guess
    would give wrong tokens without a sign of it.
    """
    kind = str(metadata.get("tokenizer.ggml.model"))
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.model is {kind!r}, which is not supported; expected "
            f"one of {', '.join(_BUILDERS)}"
        )
    if not metadata.get("tokenizer.ggml.tokens"):
        raise CheckpointError("the GGUF file has no tokenizer.ggml.tokens; download it again")
    tokenizer, adds_bos = _BUILDERS[kind](metadata)
    _add_marked_tokens(tokenizer, metadata)
    _add_template(tokenizer, metadata, adds_bos)
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json that goes with ``build_tokenizer``."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["clean_up_tokenization_spaces"] = False
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        token = _token(metadata, f"{theirs}_token_id")
        if token is not None:
            config[f"{ours}_token"] = token
    return config


def _byte_level(metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _WORDS:
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.pre is {name!r}, which is not supported; expected one "
            f"of {', '.join(_WORDS)}"
        )
    words = _WORDS[name]
    vocabulary = _vocabulary(metadata)
    merges = _merges_of_file(metadata, vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=words.whole_words))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if words.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(words.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(False, use_regex=words.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.add_bos


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    vocabulary = _vocabulary(metadata)
    merges = _merges_of_file(metadata, vocabulary) or _merges_by_score(metadata)
    unknown = _token(metadata, "unknown_token_id")
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    # llama.cpp puts a space before the text and after every special token; so does `Prepend`,
    # which runs on each stretch between special tokens.
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Tokenizer, bool]]] = MappingProxyType(
    {"gpt2": _byte_level, "llama": _sentencepiece}
)


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _merges_of_file(
    metadata: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The merges that the file lists, best first; a SentencePiece vocabulary may list none."""
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges") or []:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointError(
                f"the GGUF file's tokenizer.ggml.merges has {merge!r}, which joins or makes a "
                "token that it does not have; download it again"
            )
        merges.append((left, right))
    return merges


def _merges_by_score(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: SentencePiece's merge order."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(
            f"the GGUF file has {len(tokens)} tokens, but no merges and no score for each; "
            "download it again"
        )
    types = _types(metadata)
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    merges = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    # Of the ways to make one piece, the one with the longer left part comes first.
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def _types(metadata: Mapping[str, Any]) -> list[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(
            f"the GGUF file has {len(tokens)} tokens and {len(types)} token types; download it "
            "again"
        )
    return types


def _add_marked_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens are special; user-defined ones are matched whole but are ordinary text."""
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    marked = [
        AddedToken(token, normalized=False, special=special[TokenType(kind)])
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], _types(metadata), strict=True)
        if kind in special
    ]
    tokenizer.add_special_tokens([token for token in marked if token.special])
    tokenizer.add_tokens([token for token in marked if not token.special])


def _add_template(tokenizer: Tokenizer, metadata: Mapping[str, Any], adds_bos: bool) -> None:
    """Begin and end tokens around the text, where the file or its kind of vocabulary wants them."""
    wanted = {
        "bos_token_id": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos_token_id": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ends = {key: _token(metadata, key) for key, want in wanted.items() if want}
    used = {token: metadata[f"tokenizer.ggml.{key}"] for key, token in ends.items() if token}
    if not used:
        return
    before, after = ends.get("bos_token_id"), ends.get("eos_token_id")
    single = [token for token in (before, "$A", after) if token]
    pair = [token for token in (before, "$A", after, before, "$B:1", after) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(used.items())
    )


def _token(metadata: Mapping[str, Any], key: str) -> str | None:
    """The text of a token whose id is in the metadata."""
    index, tokens = metadata.get(f"tokenizer.ggml.{key}"), metadata["tokenizer.ggml.tokens"]
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.{key} is {index}, but it has {len(tokens)} tokens; "
            "download it again"
        )
    return str(tokens[index])
