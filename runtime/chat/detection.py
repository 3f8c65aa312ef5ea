"""From a chat template to the dialect of its model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.calls import CallFormat
from slipstream.runtime.chat.deepseek_calls import DeepSeekCalls
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.family import Family
from slipstream.runtime.chat.harmony import Harmony
from slipstream.runtime.chat.json_calls import JsonCalls
from slipstream.runtime.chat.llama_calls import LlamaCalls
from slipstream.runtime.chat.mistral_calls import MistralCalls
from slipstream.runtime.chat.pythonic_calls import PythonicCalls
from slipstream.runtime.chat.tagged_calls import TaggedCalls
from slipstream.runtime.chat.template_needs import Render, TemplateNeeds, shows_tools
from slipstream.runtime.chat.thoughts import Thoughts
from slipstream.runtime.text.tokenizer import Tokenizer

F = TypeVar("F")

_HERMES = JsonCalls("<tool_call>", "</tool_call>", "\n", "\n")
_QWEN_CODER = TaggedCalls(
    begins=("<tool_call>", "<function="),
    name="<function=",
    after_name=">",
    key="<parameter=",
    value=(">",),
    value_end="</parameter>",
    close=("</function>", "</tool_call>"),
    written=("\n<function=", ">\n", "\n", "</function>\n</tool_call>"),
    framed=True,
)
_GLM = TaggedCalls(
    begins=("<tool_call>",),
    name="",
    after_name="",
    key="<arg_key>",
    value=("</arg_key>", "<arg_value>"),
    value_end="</arg_value>",
    close=("</tool_call>",),
    written=("", "\n", "\n", "</tool_call>"),
)
_GRANITE = JsonCalls("<|tool_call|>", listed=True, others=("<tool_call>",))
_DEEPSEEK_BEGIN = DeepSeekCalls(fenced=False).begins[0]

# By vLLM's name: a format, and what a template of it holds. Those that come first are asked first;
# of one name the last is what the name alone means.
TOOL_PARSERS: Sequence[tuple[str, CallFormat, Sequence[str]]] = (
    ("deepseek_v3", DeepSeekCalls(fenced=True), (_DEEPSEEK_BEGIN, "```json")),
    ("deepseek_v31", DeepSeekCalls(fenced=False), (_DEEPSEEK_BEGIN,)),
    ("qwen3_coder", _QWEN_CODER, ("<function=", "<parameter=")),
    ("qwen3_xml", _QWEN_CODER, ("<function=", "<parameter=")),
    ("glm45", _GLM, ("<arg_key>",)),
    ("granite", _GRANITE, ("<|tool_call|>",)),
    ("mistral", MistralCalls(named=True), ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", MistralCalls(named=False), ("[TOOL_CALLS]",)),
    ("pythonic", PythonicCalls(), ("func_name1(",)),
    ("llama4_pythonic", PythonicCalls(), ("func_name1(",)),
    ("llama3_json", LlamaCalls(), ("_header_id|>", '"parameters": ')),
    ("llama4_json", LlamaCalls(), ("<|header_start|>", '"parameters": ')),
    ("hermes", _HERMES, ("<tool_call>",)),
)
_THINK = Thoughts("<think>", "</think>")
REASONING_PARSERS: Sequence[tuple[str, Thoughts, Sequence[str]]] = (
    ("granite", Thoughts("<think>", "</think>", ("<response>", "</response>")), ("<response>",)),
    (
        "granite",
        Thoughts("Here is my thought process:", "Here is my response:"),
        ("Here is my thought process:",),
    ),
    ("mistral", Thoughts("[THINK]", "[/THINK]"), ("[THINK]",)),
    ("deepseek_r1", _THINK, ("</think>",)),
    ("deepseek_r1", _THINK, ("<think>",)),
    ("deepseek_v3", _THINK, ("</think>",)),
    ("qwen3", _THINK, ("</think>",)),
    ("glm45", _THINK, ("</think>",)),
)
# One format of both.
_HARMONY = ("<|channel|>", "<|message|>", "<|start|>")
_HARMONY_TOOLS, _HARMONY_REASONING = ("openai", "harmony"), ("openai_gptoss", "harmony")


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
    needs = TemplateNeeds.of(source, render)
    marks = tokens or {}
    names = (tool_parser, reasoning_parser)
    named = tool_parser in _HARMONY_TOOLS or reasoning_parser in _HARMONY_REASONING
    if named or (names == (None, None) and all(mark in source for mark in _HARMONY)):
        return Harmony(needs, marks, frozenset(skipped))
    thoughts = _chosen("reasoning_parser", reasoning_parser, REASONING_PARSERS, source)
    calls = _chosen("tool_parser", tool_parser, TOOL_PARSERS, source)
    if tool_parser is None:
        calls = (calls or _HERMES) if shows_tools(render) else None
    return Family(thoughts, calls, needs, marks, frozenset(skipped))


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
    option: str, name: str | None, known: Sequence[tuple[str, F, Sequence[str]]], source: str
) -> F | None:
    """What is named, or else the first that the template's source tells."""
    if name is not None and name not in (each for each, _, _ in known):
        names = ", ".join(dict.fromkeys(each for each, _, _ in known))
        raise InvalidRequestError(f"{option} is {name!r:.80}; known are {names}", param=option)
    meant = [made for each, made, _ in known if each == name]
    told = (
        made
        for each, made, texts in known
        if name in (None, each) and all(text in source for text in texts)
    )
    return next(told, meant[-1] if meant else None)
