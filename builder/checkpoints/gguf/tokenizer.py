"""The tokenizer in a GGUF file's metadata as a ``tokenizers`` tokenizer.

Two kinds of vocabulary occur in the supported architectures: byte-level BPE (``gpt2``), whose way
of splitting text into words is known by name only (``words.py``), and SentencePiece BPE
(``llama``, and ``gemma4``, which puts no space before a text).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
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

from slipstream.builder.checkpoints.gguf.special_tokens import end_tokens, token_id
from slipstream.builder.checkpoints.gguf.words import WORDS
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin, shortened

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_LONGEST_PIECE = 256  # characters: every way to cut each in two is looked up
_TOKENS = f"{_PREFIX}tokens"


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
        token = _token(fields, theirs)
        if token is not None:
            config[f"{ours}_token"] = token
    return config


def _byte_level(fields: Fields) -> tuple[Tokenizer, bool]:
    if not fields.has(f"{_PREFIX}pre"):
        logger.warning(
            "the GGUF file has no tokenizer.ggml.pre, so that nobody knows how it splits text into "
            "words: 'default' is assumed, which may be wrong and make answers worse. Convert the "
            "model again, or copy the file with: gguf-new-metadata --pre-tokenizer NAME OLD NEW"
        )
    name = fields.text(f"{_PREFIX}pre", "default")
    if name not in WORDS:
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.pre is {shortened(name)}, which is not supported; "
            f"expected one of {', '.join(sorted(WORDS))}"
        )
    words = WORDS[name]
    vocabulary = _vocabulary(fields)
    merges = _merges_of_file(fields, vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=words.whole_words))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in words.patterns]
    alphabet = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.add_bos


def _sentencepiece(fields: Fields, *, space_before: bool = True) -> tuple[Tokenizer, bool]:
    vocabulary = _vocabulary(fields)
    merges = _merges_of_file(fields, vocabulary) or _merges_by_score(fields)
    unknown = _token(fields, "unknown")
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    # llama.cpp puts a space before the text and after every special token; so does `Prepend`,
    # which runs on each stretch between special tokens.
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.flag(f"{_PREFIX}add_space_prefix", space_before):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


_BUILDERS: Mapping[str, Callable[[Fields], tuple[Tokenizer, bool]]] = MappingProxyType(
    {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
        "gemma4": partial(_sentencepiece, space_before=False),
    }
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
    """Control tokens and those that end an answer are special; user-defined ones are matched whole
    but are ordinary text."""
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokens, types = fields.texts(_TOKENS), _types(fields)
    ends = end_tokens(tokens, types)
    marked = [
        AddedToken(token, normalized=False, special=token in ends or special[TokenType(kind)])
        for token, kind in zip(tokens, types, strict=True)
        if kind in special or token in ends
    ]
    tokenizer.add_special_tokens([token for token in marked if token.special])
    tokenizer.add_tokens([token for token in marked if not token.special])


def _add_template(tokenizer: Tokenizer, fields: Fields, adds_bos: bool) -> None:
    """Begin and end tokens around the text, where the file or its kind of vocabulary wants them."""
    tokens = fields.texts(_TOKENS)
    before = _token(fields, "bos") if fields.flag(f"{_PREFIX}add_bos_token", adds_bos) else None
    after = _token(fields, "eos") if fields.flag(f"{_PREFIX}add_eos_token", False) else None
    used = {token: tokens.index(token) for token in (before, after) if token}
    if not used:
        return
    single = [token for token in (before, "$A", after) if token]
    pair = [token for token in (before, "$A", after, before, "$B:1", after) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(used.items())
    )


def _token(fields: Fields, role: str) -> str | None:
    """The text of a special token; None for one that the file does not name, or not have."""
    key = f"{_PREFIX}{role}_token_id"
    known = Fields({key: token_id(fields.values, role)}, fields.origin)
    index, tokens = known.optional_integer(key), fields.texts(_TOKENS, ())
    return tokens[index] if index is not None and index < len(tokens) else None
