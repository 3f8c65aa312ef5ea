"""Token ids to text, a token at a time; the increments join to the text of all tokens at once.

Two ways cover all tokenizers. Byte-level ones (GPT-2, Llama 3, Qwen, SmolLM) are a table of bytes
and Python's incremental UTF-8 decoder. The rest (SentencePiece-like with byte fallback, Metaspace,
WordPiece) decode a small window that starts at a token already shown.
``tokenizers.decoders.DecodeStream`` is not used: it decodes a run of invalid bytes anew for every
token, and fails on invalid byte-fallback runs.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

# A byte-fallback token, as `tokenizers` recognises it.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What a token may be beside one that has a text by itself.
_ABSENT, _BYTE = -2, -1
# How far back in a prompt a token is looked for that is not special: any will do.
_NEAR = 100


class TextStream(Protocol):
    """Turns a sequence of tokens into increments of text; never emits half a character."""

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is now certain."""
        ...

    def flush(self) -> str:
        """Return what was still waiting for more bytes; incomplete characters become U+FFFD."""
        ...

    def before(self, token_id: int) -> int:
        """How many characters that are not shown yet will stand before ``token_id`` if that is
        pushed next; one that it may complete does not."""
        ...


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes are numbered from U+0100 on
    (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one outside the alphabet (an added one) is its own UTF-8."""
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:
        return token.encode()


class ByteLevelStream:
    """Text of a byte-level tokenizer."""

    __slots__ = ("_decoder", "_skip", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes], skip: frozenset[int]) -> None:
        """``token_bytes`` maps an id to its bytes; tokens in ``skip`` are left out."""
        self._token_bytes = token_bytes
        self._skip = skip
        # "replace" substitutes maximal invalid subparts, as Rust's from_utf8_lossy in `tokenizers`
        # does.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is now certain."""
        return "" if token_id in self._skip else self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD if a character is incomplete."""
        return self._decoder.decode(b"", True)

    def before(self, token_id: int) -> int:
        """1 if a character is incomplete and ``token_id`` does not go on with it."""
        first = b"" if token_id in self._skip else self._token_bytes(token_id)[:1]
        goes_on = b"\x80" <= first < b"\xc0" or not first
        return int(bool(self._decoder.getstate()[0]) and not goes_on)


class WindowStream:
    """Text of any tokenizer in which a token's text depends on its neighbours only.

    A run of byte-fallback tokens is held until it ends, because decoders show either all of its
    characters or, if any byte is wrong, none.
    """

    __slots__ = ("_decode", "_shown", "_skip", "_token", "_widths", "_window")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        token: Callable[[int], str | None],
        skip: frozenset[int],
        prompt: Sequence[int] = (),
        widths: dict[int, int] | None = None,
    ) -> None:
        """``decode`` and ``token`` are the tokenizer's; a first space stays after a ``prompt``.

        ``widths``, which streams of one tokenizer share, is where they note what they have found
        out of tokens: how many characters a token's text has by itself.
        """
        self._decode = decode
        self._token = token
        self._skip = skip
        self._widths: dict[int, int] = {} if widths is None else widths
        # The first token of the window has been shown already; it is there because a decoder may
        # treat the first token of a text differently.
        end = reversed(prompt[-_NEAR:])
        self._window: list[int] = next(([i] for i in end if self._settles(i)), [])
        self._shown = len(decode(self._window))

    def _settles(self, token_id: int) -> bool:
        return token_id not in self._skip and self._width(token_id) >= 0

    def _width(self, token_id: int) -> int:
        """The characters of a token by itself, or what it is instead."""
        width = self._widths.get(token_id)
        if width is None:
            token = self._token(token_id)
            if token is None:
                width = _ABSENT
            elif BYTE_TOKEN.fullmatch(token):
                width = _BYTE
            else:
                width = len(self._decode([token_id]))
            self._widths[token_id] = width
        return width

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is now certain."""
        if token_id in self._skip or (width := self._width(token_id)) == _ABSENT:
            return ""
        self._window.append(token_id)
        if width == _BYTE:
            return ""
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        increment = text[self._shown :]
        self._window, self._shown = [token_id], width
        return increment

    def flush(self) -> str:
        """Return the text of a byte run that the end of the sequence has ended."""
        increment = self._decode(self._window)[self._shown :]
        self._shown += len(increment)
        return increment

    def before(self, token_id: int) -> int:
        """The length of the byte run so far, without what ``token_id`` may complete."""
        held = self._decode(self._window)[self._shown :]
        return len(held if self._settles(token_id) else held.rstrip("\ufffd"))
