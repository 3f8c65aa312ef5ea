"""Texts of single tokens, and log probabilities as JSON has them."""

from __future__ import annotations

from typing import Any

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.text.tokenizer import Tokenizer

# JSON has no infinity; what cannot happen is given this, as by vLLM.
LEAST_LOGPROB = -9999.0


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


class TokenIds(TokenTexts):
    """The same with ids in place of texts, which two tokens may share."""

    def text(self, token_id: int) -> str:
        """vLLM's name for a token."""
        return f"token_id:{token_id}"


def finite(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def scored_token(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    """OpenAI's entry for one token, which others took over: itself and the likeliest ones."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.text(token_id),
            "logprob": finite(logprob),
            "bytes": texts.bytes(token_id),
        }

    top = [described(token_id, logprob) for token_id, (logprob, _) in entry.top.items()]
    return {**described(entry.token_id, entry.logprob), "top_logprobs": top}


def by_token_id(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, dict[str, Any]]:
    """vLLM's entry for one token: itself and the likeliest ones, by token id."""
    tokens = {entry.token_id: (entry.logprob, entry.rank), **entry.top}
    return {
        str(token_id): {
            "logprob": finite(logprob),
            "rank": rank,
            "decoded_token": texts.text(token_id),
        }
        for token_id, (logprob, rank) in tokens.items()
    }
