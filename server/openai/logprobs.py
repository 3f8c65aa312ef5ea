"""Log probabilities in the shapes of OpenAI's two endpoints and of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.text.tokenizer import Tokenizer

# JSON has no infinity; what cannot happen is given this, as by vLLM.
_LOWEST = -9999.0
Scores = Sequence[TokenLogprobs | None]


class TokenTexts:
    """Text and bytes of single tokens, remembered: answers name the same ones again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token_id: int) -> str:
        """What a token adds to a text; a part of a character becomes U+FFFD."""
        return self._both(token_id)[0]

    def bytes(self, token_id: int) -> list[int]:
        """Its bytes as numbers."""
        return self._both(token_id)[1]

    def _both(self, token_id: int) -> tuple[str, list[int]]:
        known = self._known.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            known = self._known[token_id] = raw.decode("utf-8", "replace"), list(raw)
        return known


def chat_logprobs(entries: Iterable[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/chat/completions``."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": _finite(logprob),
            "bytes": texts.bytes(token_id),
        }

    content = [
        described(entry.token_id, entry.logprob)
        | {"top_logprobs": [described(i, value) for i, (value, _) in entry.top.items()]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int], entries: Scores, texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/completions``, whose text begins at ``offset``.

    A token without an entry (the first of a prompt) has null. Of tokens with the same text the
    likeliest is named.
    """
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(texts.text(token_id))
    return {
        "text_offset": offsets,
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "tokens": [texts.text(token_id) for token_id in token_ids],
        "top_logprobs": [None if entry is None else _by_text(entry, texts) for entry in entries],
    }


def prompt_logprobs(scores: Scores, texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for every prompt token but the first, entries by token id."""
    return [None if entry is None else _by_id(entry, texts) for entry in scores]


def _by_text(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    values = {texts.text(entry.token_id): _finite(entry.logprob)}
    for token_id, (logprob, _) in entry.top.items():
        text = texts.text(token_id)
        values[text] = max(values.get(text, _LOWEST), _finite(logprob))
    return values


def _by_id(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    values = {entry.token_id: (entry.logprob, entry.rank), **entry.top}
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": texts.text(token_id),
        }
        for token_id, (logprob, rank) in values.items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
