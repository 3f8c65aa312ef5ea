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
from slipstream.weights.json import Fields, Origin, shortened

_PREFIX = "tokenizer.ggml."
_LONGEST_PIECE = 256  # characters: every way to cut each in two is looked up
_TOKENS = f"{_PREFIX}tokens"
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


def _fields(metadata: Mapping[str, object]) -> Fields:
    return Fields(metadata, Origin("the GGUF file's metadata"))


def build_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that ``tokenizer.ggml.*`` describes.

    Raises CheckpointError for a kind of vocabulary or word splitting that is not known: a guess
    would give wrong tokens without a sign of it.
    """
    fields = _fields(metadata)
    kind = fields.text(f"{_PREFIX}model", "None")
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.model is {shortened(kind)}, which is not supported; "
            f"expected one of {', '.join(_BUILDERS)}"
        )
    if not fields.texts(_TOKENS, ()):
        raise CheckpointError("the GGUF file has no tokenizer.ggml.tokens; download it again")
    tokenizer, adds_bos = _BUILDERS[kind](fields)
    _add_marked_tokens(tokenizer, fields)
    _add_template(tokenizer, fields, adds_bos)
    return tokenizer


def tokenizer_config(metadata: Mapping[str, object]) -> dict[str, Any]:
    """The tokenizer_config.json that goes with ``build_tokenizer``."""
    fields = _fields(metadata)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["clean_up_tokenization_spaces"] = False
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        token = _token(fields, f"{theirs}_token_id")
        if token is not None:
            config[f"{ours}_token"] = token
    return config


def _byte_level(fields: Fields) -> tuple[Tokenizer, bool]:
    name = fields.text(f"{_PREFIX}pre", "default")
    if name not in _WORDS:
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.pre is {shortened(name)}, which is not supported; "
            f"expected one of {', '.join(_WORDS)}"
        )
    words = _WORDS[name]
    vocabulary = _vocabulary(fields)
    merges = _merges_of_file(fields, vocabulary)
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


def _sentencepiece(fields: Fields) -> tuple[Tokenizer, bool]:
    vocabulary = _vocabulary(fields)
    merges = _merges_of_file(fields, vocabulary) or _merges_by_score(fields)
    unknown = _token(fields, "unknown_token_id")
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    # llama.cpp puts a space before the text and after every special token; so does `Prepend`,
    # which runs on each stretch between special tokens.
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.flag(f"{_PREFIX}add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


_BUILDERS: Mapping[str, Callable[[Fields], tuple[Tokenizer, bool]]] = MappingProxyType(
    {"gpt2": _byte_level, "llama": _sentencepiece}
)


def _vocabulary(fields: Fields) -> dict[str, int]:
    return {token: index for index, token in enumerate(fields.texts(_TOKENS))}


def _merges_of_file(fields: Fields, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that the file lists, best first; a SentencePiece vocabulary may list none."""
    merges = []
    for merge in fields.texts(f"{_PREFIX}merges", ()):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointError(
                f"the GGUF file's tokenizer.ggml.merges has {shortened(merge)}, which joins or "
                "makes a token that it does not have; download it again"
            )
        merges.append((left, right))
    return merges


def _merges_by_score(fields: Fields) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: SentencePiece's merge order."""
    tokens, scores = fields.texts(_TOKENS), fields.numbers(f"{_PREFIX}scores", ())
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"the GGUF file has {len(tokens)} tokens, but no merges and no score for each; "
            "download it again"
        )
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST_PIECE:
        raise CheckpointError(
            f"the GGUF file has no merges and a token of {len(longest)} characters, "
            f"{longest:.40}…, which no vocabulary of pieces has; download it again"
        )
    types = _types(fields)
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


def _types(fields: Fields) -> tuple[int, ...]:
    tokens = fields.texts(_TOKENS)
    types = fields.integers(f"{_PREFIX}token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(
            f"the GGUF file has {len(tokens)} tokens and {len(types)} token types; download it "
            "again"
        )
    return types


def _add_marked_tokens(tokenizer: Tokenizer, fields: Fields) -> None:
    """Control tokens are special; user-defined ones are matched whole but are ordinary text."""
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    marked = [
        AddedToken(token, normalized=False, special=special[TokenType(kind)])
        for token, kind in zip(fields.texts(_TOKENS), _types(fields), strict=True)
        if kind in special
    ]
    tokenizer.add_special_tokens([token for token in marked if token.special])
    tokenizer.add_tokens([token for token in marked if not token.special])


def _add_template(tokenizer: Tokenizer, fields: Fields, adds_bos: bool) -> None:
    """Begin and end tokens around the text, where the file or its kind of vocabulary wants them."""
    wanted = {
        "bos_token_id": fields.flag(f"{_PREFIX}add_bos_token", adds_bos),
        "eos_token_id": fields.flag(f"{_PREFIX}add_eos_token", False),
    }
    ends = {key: _token(fields, key) for key, want in wanted.items() if want}
    used = {token: fields.integer(f"{_PREFIX}{key}") for key, token in ends.items() if token}
    if not used:
        return
    before, after = ends.get("bos_token_id"), ends.get("eos_token_id")
    single = [token for token in (before, "$A", after) if token]
    pair = [token for token in (before, "$A", after, before, "$B:1", after) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(used.items())
    )


def _token(fields: Fields, key: str) -> str | None:
    """The text of a token whose id is in the metadata."""
    index, tokens = fields.optional_integer(f"{_PREFIX}{key}"), fields.texts(_TOKENS, ())
    if index is None:
        return None
    if index >= len(tokens):
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.{key} is {index}, but it has {len(tokens)} tokens; "
            "download it again"
        )
    return str(tokens[index])
