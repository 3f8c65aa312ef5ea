"""Tokenizers of a few tokens, in the ways of the two families of models."""

from __future__ import annotations

import tokenizers

from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings


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
