"""Texts that are too long, told before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable

from slipstream.errors import InvalidRequestError
from slipstream.runtime.text.tokenizer import Tokenizer


def check_length(tokenizer: Tokenizer, texts: Iterable[str], max_seq_len: int) -> None:
    """Raise ``InvalidRequestError`` for the ``texts`` of one prompt if they cannot fit in
    ``max_seq_len`` tokens, whatever they say.

    Costs a pass over their bytes. A text that passes may still be too long.
    """
    least = sum(map(tokenizer.least_tokens, texts))
    if least >= max_seq_len:
        raise InvalidRequestError(
            f"the prompt has at least {least} tokens; this engine takes 1 to {max_seq_len - 1}"
            f" (max_seq_len {max_seq_len} less one token to generate). Shorten the prompt or"
            " load the engine with a larger max_seq_len"
        )
