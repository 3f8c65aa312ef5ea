"""What a chat template wants of messages with calls, found out by rendering some."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.options import ChatOptions, Tool

# Renders messages and tools; raises InvalidRequestError where the template does.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
_EFFORT = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")
_NAME, _KEY, _TEXT = "probe_tool", "probe_key", "probe text"
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "It probes."}}
_SCHEMA = {
    "type": "object",
    "properties": {_KEY: {"type": "string", "description": "A text."}},
    "required": [_KEY],
}


@dataclass(frozen=True, slots=True)
class TemplateNeeds:
    """How messages are given to a template.

    text_arguments: arguments of past calls as JSON text, else as an object.
    null_content: what is told beside calls is null if there is nothing, else "".
    single_calls: one call a message.
    names: the variables of thinking that the template knows.
    """

    text_arguments: bool = False
    null_content: bool = False
    single_calls: bool = False
    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, source: str, render: Render) -> TemplateNeeds:
        """Of a template."""
        names = frozenset(
            name for name in (*_SWITCHES, _EFFORT) if re.search(rf"(?<![\w.'\"]){name}\b", source)
        )
        ways = [(text, null) for null in (False, True) for text in (False, True)]
        for text, null in ways:
            for single in (False, True):
                needs = cls(text, null, single, names)
                if needs._shows_calls(render):
                    return needs
        return cls(names=names)

    def _shows_calls(self, render: Render) -> bool:
        """Whether two past calls are rendered with their arguments as they are."""
        calls: list[dict[str, Any]] = []
        answers: list[dict[str, Any]] = []
        for i in range(2):
            function = {"name": _NAME, "arguments": json.dumps({_KEY: f"{_TEXT} {i}"})}
            calls.append({"id": f"abcdefgh{i}", "type": "function", "function": function})
            answers.append({"role": "tool", "tool_call_id": f"abcdefgh{i}", "content": f"seen {i}"})
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Probe."},
            {"role": "assistant", "content": None, "tool_calls": calls},
            *answers,
        ]
        try:
            text = render(self.messages(messages), None)
        except InvalidRequestError:
            return False
        shown = all(f"{_TEXT} {i}" in text for i in range(2)) and text.count(_NAME) >= 2
        return shown and f"{{'{_KEY}'" not in text and f'\\"{_KEY}' not in text

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages, with calls in OpenAI's shape, as the template wants them."""
        if not all(isinstance(message, Mapping) for message in messages):
            return cast("list[dict[str, Any]]", messages)  # refused when they are rendered
        names: dict[str, str] = {}
        made: list[dict[str, Any]] = []
        for message in messages:
            calls = message.get("tool_calls")
            if isinstance(calls, Sequence) and not isinstance(calls, str) and calls:
                checked = [_checked(call, len(made)) for call in calls]
                names |= {call["id"]: call["function"]["name"] for call in checked}
                made.append({**message, "tool_calls": checked})
            else:
                made.append(_without_calls(message, names))
        shaped = [self._shaped(m) if "tool_calls" in m else m for m in made]
        return _apart(shaped) if self.single_calls else shaped

    def _shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content") or (None if self.null_content else "")
        calls = [
            {**c, "function": {**c["function"], "arguments": self._arguments(c["function"])}}
            for c in message["tool_calls"]
        ]
        return {**message, "content": content, "tool_calls": calls}

    def _arguments(self, function: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        arguments = function["arguments"]
        return json.dumps(arguments, ensure_ascii=False) if self.text_arguments else arguments

    def tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Tools in OpenAI's shape, with all that templates expect."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": dict(tool.parameters or {"type": "object", "properties": {}}),
                },
            }
            for tool in tools
        ]

    def variables(self, options: ChatOptions) -> dict[str, Any]:
        """Of thinking, those that the template knows."""
        effort = options.reasoning_effort
        thinking = options.thinking if effort != "none" else False
        known: dict[str, Any] = {}
        if thinking is not None:
            known |= dict.fromkeys(self.names.intersection(_SWITCHES), thinking)
        if effort is not None and effort != "none" and _EFFORT in self.names:
            known[_EFFORT] = effort
        return known


def shows_tools(render: Render) -> bool:
    """Whether a template writes the tools that it is given."""
    tool: dict[str, Any] = {**_TOOL, "function": {**_TOOL["function"], "parameters": _SCHEMA}}  # type: ignore[dict-item]
    try:
        return _NAME in render([{"role": "user", "content": "Probe."}], [tool])
    except InvalidRequestError:
        return False


def _checked(call: object, index: int) -> dict[str, Any]:
    """A call with arguments as an object, whatever way they came."""
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(function, Mapping)
        or not isinstance(name, str)
    ):
        raise InvalidRequestError(
            f"messages[{index}]['tool_calls'] has {call!r:.80}; use e.g. {{'id': 'call_1', 'type': "
            "'function', 'function': {'name': 'f', 'arguments': '{}'}}",
            param="messages",
        )
    arguments = function.get("arguments")
    return {
        **call,
        "id": str(call.get("id") or f"call{index:05d}"),
        "type": "function",
        "function": {**function, "name": name, "arguments": _object(arguments)},
    }


def _object(arguments: object) -> Any:  # noqa: ANN401 - JSON
    """Arguments that a model once wrote: what is no object is passed on as it is."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _without_calls(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A message without an empty list of calls; a tool's with the name of the tool."""
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    called = kept.get("tool_call_id")
    if kept.get("role") == "tool":
        kept["content"] = _joined(kept.get("content"))
        if not kept.get("name") and isinstance(called, str) and called in names:
            kept["name"] = names[called]
    return kept


def _joined(content: object) -> object:
    """What a tool said as one text: few templates take it in parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list | tuple) else ()
    given = [part.get("text") for part in parts if isinstance(part, Mapping)]
    texts = [text for text in given if isinstance(text, str)]
    return "".join(texts) if texts and len(texts) == len(parts) else content


def _apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, with the tool's answer after it."""
    apart: list[dict[str, Any]] = []
    answers = {m.get("tool_call_id"): m for m in messages if m.get("role") == "tool"}
    told: set[object] = set()
    for message in messages:
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            if message.get("tool_call_id") not in told or message.get("role") != "tool":
                apart.append(message)
            continue
        for i, call in enumerate(calls):
            rest = message if i == 0 else {"role": message["role"], "content": ""}
            apart.append({**rest, "tool_calls": [call]})
            if call["id"] in answers:
                apart.append(answers[call["id"]])
                told.add(call["id"])
    return apart
