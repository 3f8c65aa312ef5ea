"""What one request may ask of a server that many share; the Python API has no such bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.sampling.params import SamplingParams

MAX_SEQUENCES = 2048  # completions of all prompts of a request
MAX_N = 128
MAX_LOGPROBS = 20
MAX_LISTED = 128  # tokens whose log probabilities are told at every position
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
MAX_TOOLS = 512
MAX_NAME = 128
# Of a schema, a grammar or an expression that an answer is held to.
MAX_FORM_LENGTH = 1 << 18
MAX_FORM_DEPTH = 64
_TOOL_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}")

_MOST: Mapping[str, int] = {
    "n": MAX_N,
    "logprobs": MAX_LOGPROBS,
    "prompt_logprobs": MAX_LOGPROBS,
}
# Of these -1, all tokens, is given too: prompts are scored once, and the answer has a bound.
_ALL = frozenset({"prompt_logprobs"})
_MOST_ENTRIES: Mapping[str, int] = {
    "stop": MAX_TEXTS,
    "bad_words": MAX_TEXTS,
    "stop_token_ids": MAX_TOKEN_IDS,
    "bad_words_token_ids": MAX_TOKEN_IDS,
    "logit_bias": MAX_TOKEN_IDS,
    "allowed_token_ids": MAX_ALLOWED,
    "logprob_token_ids": MAX_LISTED,
}
_TEXTS = ("stop", "bad_words")


def check_limits(params: SamplingParams) -> None:
    """Raise ``InvalidRequestError`` for what is more than one request may ask."""
    for name, most in _MOST.items():
        value = getattr(params, name)
        if value is not None and not -(name in _ALL) <= value <= most:
            raise InvalidRequestError(
                f"{name}={value} is more than this server gives; at most {most}", param=name
            )
    for name, most in _MOST_ENTRIES.items():
        count = len(getattr(params, name) or ())
        if count > most:
            raise InvalidRequestError(
                f"{name} has {count} entries; this server takes {most}", param=name
            )
    if params.structured is not None:
        check_form(params.structured.json, "structured", len(params.structured.text))
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


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise ``InvalidRequestError`` for too many or too large tools, and for names that a model
    could not be shown as they are."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools has {len(tools)} entries; this server takes {MAX_TOOLS}", param="tools"
        )
    for index, tool in enumerate(tools):
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequestError(
                f"tools[{index}] is called {tool.name!r:.80}; a name is 1 to {MAX_NAME} of "
                "ASCII's letters and digits and of _ - . : /",
                param="tools",
            )
        check_form(tool.parameters, f"tools[{index}]", param="tools")


def check_form(
    form: object, field: str, length: int | None = None, *, param: str | None = None
) -> None:
    """Raise ``InvalidRequestError`` for what an answer is held to if that is too large or nested
    too deep; ``length`` is that of its text, None: to be told."""
    depth = _depth(form)
    if depth > MAX_FORM_DEPTH:
        raise InvalidRequestError(
            f"{field} is nested more than {MAX_FORM_DEPTH} deep; use $defs and $ref, or less depth",
            param=param or field,
        )
    length = len(json.dumps(form)) if length is None else length
    if length > MAX_FORM_LENGTH:
        raise InvalidRequestError(
            f"{field} has {length} characters; this server takes {MAX_FORM_LENGTH}",
            param=param or field,
        )


def _depth(value: object) -> int:
    """How deep lists and objects are nested; what is deeper than is taken is not looked into."""
    level, depth = [value], 0
    while level and depth <= MAX_FORM_DEPTH:
        inner = [v for v in level if isinstance(v, Mapping | list | tuple)]
        level = [w for v in inner for w in (v.values() if isinstance(v, Mapping) else v)]
        depth += bool(inner)
        if not inner:
            break
    return depth
