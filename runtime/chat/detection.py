"""From a chat template to the dialect of its model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.calls import CallFormat
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.family import Family
from slipstream.runtime.chat.json_calls import JsonCalls
from slipstream.runtime.chat.template_needs import Render, TemplateNeeds, shows_tools
from slipstream.runtime.chat.thoughts import Thoughts
from slipstream.runtime.text.tokenizer import Tokenizer

F = TypeVar("F")

_HERMES = JsonCalls("<tool_call>", "</tool_call>", "\n", "\n")

# Names are vLLM's. What a template must hold to be of a family, in the order in which they are
# asked; a format without such a text is chosen by name only.
TOOL_PARSERS: Mapping[str, tuple[CallFormat, tuple[str, ...]]] = {
    "hermes": (_HERMES, ("<tool_call>",)),
}
_THINK = Thoughts("<think>", "</think>")
REASONING_PARSERS: Mapping[str, tuple[Thoughts, tuple[str, ...]]] = {
    "qwen3": (_THINK, ("</think>",)),
}


def find_dialect(
    source: str,
    render: Render,
    *,
    tokens: Mapping[str, int] | None = None,
    skipped: Collection[str] = (),
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Dialect:
    """The dialect of a chat template, by what stands in its ``source`` and how it renders.

    ``tokens``: ids of texts that are one token; ``skipped``: the special ones, which are left out
    of text. The parsers' names, where given, decide; raises ``InvalidRequestError`` for an unknown
    one.
    """
    thoughts = _chosen("reasoning_parser", reasoning_parser, REASONING_PARSERS, source)
    calls = _chosen("tool_parser", tool_parser, TOOL_PARSERS, source)
    if tool_parser is None and not shows_tools(render):
        calls = None
    elif calls is None:
        calls = _HERMES
    return Family(
        thoughts, calls, TemplateNeeds.of(source, render), tokens or {}, frozenset(skipped)
    )


def dialect_of(
    tokenizer: Tokenizer, *, tool_parser: str | None = None, reasoning_parser: str | None = None
) -> Dialect:
    """The dialect of a tokenizer's chat templates, as ``find_dialect`` has it."""
    render = partial(_render, tokenizer)
    tokens = tokenizer.marker_tokens
    special = tokenizer.special_token_ids
    return find_dialect(
        "\n".join(tokenizer.chat_templates.values()),
        render,
        tokens=tokens,
        skipped=[text for text, token in tokens.items() if token in special],
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )


def _render(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools)


def _chosen(
    option: str, name: str | None, known: Mapping[str, tuple[F, Sequence[str]]], source: str
) -> F | None:
    """What is named, or else the first that the template's source tells."""
    if name is None:
        return next(
            (made for made, texts in known.values() if texts and all(t in source for t in texts)),
            None,
        )
    if name not in known:
        raise InvalidRequestError(
            f"{option} is {name!r:.80}; known are {', '.join(known)}", param=option
        )
    return known[name][0]
