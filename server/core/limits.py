"""What one request may ask of a server that many share; the Python API has no such bounds."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.params import SamplingParams

MAX_SEQUENCES = 2048  # completions of all prompts of a request
MAX_N = 128
MAX_LOGPROBS = 20
# More of these would slow down every step of everybody else's requests.
MAX_TEXTS = 64
MAX_TEXT_LENGTH = 1000
MAX_TOKEN_IDS = 1024
MAX_ALLOWED = 16384  # tokens of an allow list, which is read once
# Log probabilities in one answer: some 35 MB of JSON.
MAX_SCORES = 1 << 19
# Numbers of all vectors of one answer: some 50 MB of JSON.
MAX_NUMBERS = 1 << 22
# Of a body: more take the event loop tens of milliseconds to read.
MAX_VALUES = 1 << 18
MAX_KEYS = 1 << 15  # lists, objects and fields
MAX_FIELDS = 100  # of an object whose fields are known

_MOST: Mapping[str, int] = {
    "n": MAX_N,
    "logprobs": MAX_LOGPROBS,
    "prompt_logprobs": MAX_LOGPROBS,
}
_MOST_ENTRIES: Mapping[str, int] = {
    "stop": MAX_TEXTS,
    "bad_words": MAX_TEXTS,
    "stop_token_ids": MAX_TOKEN_IDS,
    "bad_words_token_ids": MAX_TOKEN_IDS,
    "logit_bias": MAX_TOKEN_IDS,
    "allowed_token_ids": MAX_ALLOWED,
}
_TEXTS = ("stop", "bad_words")


def check_limits(params: SamplingParams) -> None:
    """Raise ``InvalidRequestError`` for what is more than one request may ask."""
    for name, most in _MOST.items():
        value = getattr(params, name)
        if value is not None and not 0 <= value <= most:
            raise InvalidRequestError(
                f"{name}={value} is more than this server gives; at most {most}", param=name
            )
    for name, most in _MOST_ENTRIES.items():
        count = len(getattr(params, name) or ())
        if count > most:
            raise InvalidRequestError(
                f"{name} has {count} entries; this server takes {most}", param=name
            )
    total = sum(map(len, params.bad_words_token_ids))
    if total > MAX_ALLOWED:
        raise InvalidRequestError(
            f"bad_words_token_ids has {total} tokens in all; this server takes {MAX_ALLOWED}",
            param="bad_words_token_ids",
        )
    for name in _TEXTS:
        longest = max(map(len, getattr(params, name)), default=0)
        if longest > MAX_TEXT_LENGTH:
            raise InvalidRequestError(
                f"{name} has a text of {longest} characters; this server takes {MAX_TEXT_LENGTH}",
                param=name,
            )
