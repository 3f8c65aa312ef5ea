"""Texts that are too long, told before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from slipstream.errors import ContextLengthError
from slipstream.runtime.text.tokenizer import Tokenizer


def check_length(
    tokenizer: Tokenizer, texts: Iterable[str], max_seq_len: int, *, generates: bool = True
) -> None:
    """Raise ``ContextLengthError`` for the ``texts`` of one prompt if they cannot fit in
    ``max_seq_len`` tokens, of which one is generated, whatever they say.

    Costs a pass over their bytes. A text that passes may still be too long.
    """
    least = sum(map(tokenizer.least_tokens, texts))
    if least > max_seq_len - generates:
        raise ContextLengthError(f"at least {least}", max_seq_len, generates=generates)


def texts_of(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The contents of a conversation, as far as they are text."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(text, str):
                yield text
