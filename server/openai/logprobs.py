"""Log probabilities in the shapes of OpenAI's two endpoints and of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.server.core.logprobs import (
    LEAST_LOGPROB,
    TokenTexts,
    by_token_id,
    finite,
    scored_token,
)

Scores = Sequence[TokenLogprobs | None]


def chat_logprobs(entries: Iterable[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/chat/completions``."""
    return {"content": [scored_token(entry, texts) for entry in entries], "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int], entries: Scores, offsets: Sequence[int], texts: TokenTexts
) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/completions``; tokens begin at ``offsets`` of its text.

    A token without an entry (the first of a prompt) has null. Of tokens with the same text the
    likeliest is named.
    """
    return {
        "text_offset": offsets,
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
        "tokens": [texts.text(token_id) for token_id in token_ids],
        "top_logprobs": [None if entry is None else _by_text(entry, texts) for entry in entries],
    }


def prompt_logprobs(scores: Scores | None, texts: TokenTexts) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: for every prompt token but the first, entries by token id."""
    if scores is None:
        return None
    return [None if entry is None else by_token_id(entry, texts) for entry in scores]


def _by_text(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    values = {texts.text(entry.token_id): finite(entry.logprob)}
    for token_id, (logprob, _) in entry.top.items():
        text = texts.text(token_id)
        values[text] = max(values.get(text, LEAST_LOGPROB), finite(logprob))
    return values
