"""Texts to token windows: what a model is calibrated on, and what it is evaluated on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import InvalidRequestError
from slipstream.quantize.documents import Document, Message, read

log = logging.getLogger(__name__)

Tokens = NDArray[np.int32]
# Text to token ids as for a prompt: with what the tokenizer puts in front of one, such as BOS.
Encode = Callable[[str], Sequence[int]]
# A conversation as text.
ApplyChatTemplate = Callable[[Sequence[Message]], str]
# (prompt, count, seed) to ``count`` tokens that the model itself continues ``prompt`` with.
Sample = Callable[[Sequence[int], int, int], Sequence[int]]
# A file, SELF, or None for the texts that come with this package.
Source = str | Path | None

SELF = "self"
EVALUATION_WINDOW = 2048
_SAMPLE_PROMPT = 8  # tokens of a text that the model is given to continue
# A text is shuffled in pieces of about a window: characters of English a token.
_CHARACTERS_A_TOKEN = 4


def calibration_windows(
    encode: Encode,
    apply_chat_template: ApplyChatTemplate | None,
    source: Source,
    size: int,
    max_seq_length: int,
    seed: int = 0,
    sample: Sample | None = None,
) -> list[Tokens]:
    """``size`` windows of ``max_seq_length`` tokens, int32, the same for the same ``seed``.

    ``source`` is a ``.txt`` or ``.jsonl`` file (a line has ``text``, ``messages`` or ``prompt``),
    None for the texts that come with this package, or ``self`` for text that the model writes,
    by ``sample``. Every window starts as ``encode`` starts a text. A source that is too short for
    all windows gives fewer, with a warning. Raises InvalidRequestError for a file that cannot be
    read, is malformed or too short for one window.
    """
    encoder = _Encoder(encode, apply_chat_template)
    body = max_seq_length - len(encoder.prefix)
    if size < 1 or body < 2:
        raise InvalidRequestError(
            f"calibration with {size} windows of {max_seq_length} tokens is too little; take at "
            "least 1 window of 16 tokens: raise --calib-size or --calib-max-seq-length"
        )
    rng = np.random.default_rng(seed)
    if source == SELF:
        return _sampled(encoder, sample, size, max_seq_length, rng)
    groups = read(source, "calibration")
    found = _first(_mixed(groups, encoder, body, rng), size)
    if not found:
        raise _too_short(source, groups, encoder, max_seq_length)
    if len(found) < size:
        log.warning(
            "calibration has %d windows of %d tokens, not the %d asked for: that is all of %s",
            *(len(found), max_seq_length, size, _name(source)),
        )
    return found


def evaluation_windows(
    encode: Encode,
    source: str | Path | None = None,
    window: int = EVALUATION_WINDOW,
    apply_chat_template: ApplyChatTemplate | None = None,
) -> list[Tokens]:
    """All of a text, in order, as windows of ``window`` tokens int32; the last is shorter.

    Arguments and errors are those of ``calibration_windows``; with ``source`` None it is the
    evaluation text of this package, which shares nothing with the calibration text.
    """
    encoder = _Encoder(encode, apply_chat_template)
    body = window - len(encoder.prefix)
    if body < 2:
        raise InvalidRequestError(f"windows of {window} tokens are too short; take at least 16")
    documents = [document for group in read(source, "evaluation") for document in group]
    tokens = [token for document in documents for token in encoder.body(document)]
    if len(tokens) < 2:
        raise InvalidRequestError(
            f"{_name(source)} holds {len(tokens)} tokens; a few thousand make a useful figure: "
            "give a longer text"
        )
    parts = (tokens[start : start + body] for start in range(0, len(tokens), body))
    return [encoder.window(part) for part in parts if len(part) > 1]


class _Encoder:
    """Documents to tokens, without and with what the tokenizer puts in front of a text."""

    def __init__(self, encode: Encode, apply_chat_template: ApplyChatTemplate | None) -> None:
        self._encode = encode
        self._apply_chat_template = apply_chat_template
        self.prefix = _common_prefix(encode(""), encode("a"))

    def body(self, document: Document) -> list[int]:
        """Tokens of a document, without the prefix, which a chat template may write itself."""
        text = document if isinstance(document, str) else self._conversation(document)
        tokens = list(self._encode(text))
        for _ in range(2):
            if self.prefix and tokens[: len(self.prefix)] == self.prefix:
                tokens = tokens[len(self.prefix) :]
        return tokens

    def window(self, body: Sequence[int]) -> Tokens:
        """A window with these tokens after the prefix."""
        return np.array([*self.prefix, *body], np.int32)

    def _conversation(self, messages: Sequence[Message]) -> str:
        if self._apply_chat_template is not None:
            return self._apply_chat_template(messages)
        return "".join(f"{m['role']}: {m['content']}\n\n" for m in messages)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> list[int]:
    prefix: list[int] = []
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        prefix.append(one)
    return prefix


def _mixed(
    groups: Sequence[Sequence[Document]], encoder: _Encoder, body: int, rng: np.random.Generator
) -> Iterator[Tokens]:
    """Windows of all groups in turn, from each as often as it is long (Sainte-Laguë's method)."""
    shuffled = [_shuffled_pieces(group, body * _CHARACTERS_A_TOKEN, rng) for group in groups]
    sizes = [sum(map(_length, group)) for group in groups]
    windows = [_packed(pieces, encoder, body) for pieces in shuffled]
    taken = dict.fromkeys(range(len(groups)), 0)
    while taken:
        index = max(taken, key=lambda index: sizes[index] / (2 * taken[index] + 1))
        window = next(windows[index], None)
        if window is None:
            del taken[index]
        else:
            taken[index] += 1
            yield window


def _shuffled_pieces(
    documents: Sequence[Document], characters: int, rng: np.random.Generator
) -> list[Document]:
    """The documents of a group in random order, long texts cut at line ends."""
    pieces = [piece for document in documents for piece in _pieces(document, characters)]
    return [pieces[index] for index in rng.permutation(len(pieces))]


def _pieces(document: Document, characters: int) -> Iterator[Document]:
    if not isinstance(document, str):
        yield document
        return
    start = 0
    while start < len(document):
        end = document.find("\n", start + characters - 1) + 1
        if end == 0 or end > start + 2 * characters:  # one very long line
            end = start + characters
        yield document[start:end]
        start = end


def _packed(documents: Sequence[Document], encoder: _Encoder, body: int) -> Iterator[Tokens]:
    """One document after the other, cut into full windows."""
    tokens: list[int] = []
    for document in documents:
        tokens += encoder.body(document)
        while len(tokens) >= body:
            yield encoder.window(tokens[:body])
            tokens = tokens[body:]


def _length(document: Document) -> int:
    """Bytes of text, which are a fairer measure than characters across scripts."""
    if isinstance(document, str):
        return len(document.encode())
    return sum(len(message["content"].encode()) for message in document)


def _sampled(
    encoder: _Encoder,
    sample: Sample | None,
    size: int,
    max_seq_length: int,
    rng: np.random.Generator,
) -> list[Tokens]:
    """What the model makes of the first words of texts of every kind."""
    if sample is None:
        raise InvalidRequestError(
            "calibration on the model's own text needs a model that can generate here; give a "
            "text file, or nothing for the text that comes with Slipstream"
        )
    start = max(1, min(_SAMPLE_PROMPT, max_seq_length // 2 - len(encoder.prefix)))
    mixed = _mixed(read(None, "calibration"), encoder, start, rng)
    windows = []
    for prompt in _first(mixed, size):
        seed = int(rng.integers(2**31))
        written = sample(prompt.tolist(), max_seq_length - len(prompt), seed)
        windows.append(np.array([*prompt, *written], np.int32))
    return windows


def _first(windows: Iterator[Tokens], size: int) -> list[Tokens]:
    return [window for _, window in zip(range(size), windows, strict=False)]


def _too_short(
    source: Source,
    groups: Sequence[Sequence[Document]],
    encoder: _Encoder,
    max_seq_length: int,
) -> InvalidRequestError:
    tokens = sum(len(encoder.body(document)) for group in groups for document in group)
    return InvalidRequestError(
        f"{_name(source)} holds {tokens} tokens, less than one window of {max_seq_length}; give a "
        f"longer text or lower --calib-max-seq-length"
    )


def _name(source: Source) -> str:
    return "the text that comes with Slipstream" if source is None else str(source)
