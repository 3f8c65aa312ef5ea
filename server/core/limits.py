"""What one request may ask of a server that many share; the Python API has no such bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
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
# What a template is given as fields of a request.
_RESERVED = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}
)
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
        form = params.structured
        check_form(form.json, "the structured output", len(form.text), param="structured")
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


def check_conversation(conversation: Conversation) -> None:
    """Raise ``InvalidRequestError`` for variables of the template that are fields of a request, and
    for tools that are too many, too large or badly named."""
    reserved = sorted(_RESERVED & conversation.variables.keys())
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs holds {', '.join(reserved)}; use the field of the request",
            param="chat_template_kwargs",
        )
    _check_tools(conversation.options.tools)


def _check_tools(tools: Sequence[Tool]) -> None:
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


def check_form(form: object, name: str, length: int | None = None, *, param: str) -> None:
    """Raise ``InvalidRequestError`` for what an answer is held to if that is too large or nested
    too deep; ``length`` is that of its text, None: to be told."""
    depth = _depth(form)
    if depth > MAX_FORM_DEPTH:
        raise InvalidRequestError(
            f"{name} is nested more than {MAX_FORM_DEPTH} deep; use $defs and $ref, or less depth",
            param=param,
        )
    length = len(json.dumps(form)) if length is None else length
    if length > MAX_FORM_LENGTH:
        raise InvalidRequestError(
            f"{name} has {length} characters; this server takes {MAX_FORM_LENGTH}",
            param=param,
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
