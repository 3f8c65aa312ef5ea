"""Conversations as inputs: ``messages`` and what belongs to them, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool, ToolChoice
from slipstream.server.triton.interface import MESSAGES

_MOST_BYTES = 4 << 20  # what a request over HTTP may have, too
_MESSAGE = '{"role": "user", "content": "..."}'
_CALL = '{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}'
_TOOL = '{"type": "function", "function": {"name": "f", "parameters": {...}}}'
_CHOICE = '"auto", "none", "required" or {"type": "function", "function": {"name": "f"}}'


def conversation_of(given: Mapping[str, Any]) -> Conversation:
    """The conversation of the inputs that are ``given``, as JSON text or decoded; ``messages`` is
    one of them.

    Raises ``InvalidRequestError`` naming the input.
    """
    messages = _list(MESSAGES, given[MESSAGES], _MESSAGE)
    if not messages:
        raise InvalidRequestError(f"messages is empty; send at least [{_MESSAGE}]")
    tools = _list("tools", given.get("tools", []), _TOOL)
    effort = given.get("reasoning_effort")
    if not isinstance(effort, str | None):
        raise InvalidRequestError(f"reasoning_effort={effort!r:.80} is no text; send e.g. low")
    options = ChatOptions(
        tools=[_tool(tool, index) for index, tool in enumerate(tools)],
        tool_choice=_choice(given.get("tool_choice", "auto")),
        thinking=None if effort is None else effort != "none",
        reasoning_effort=effort,
    )
    plain = [_message(message, index) for index, message in enumerate(messages)]
    return Conversation(plain, options=options)


def _list(name: str, value: object, example: str) -> list[Any]:
    value = _decoded(name, value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"{name}={value!r:.80} is not a list in JSON; write for example [{example}]"
        )
    return value


def _decoded(name: str, text: str) -> object:
    """Decoded JSON; the text itself if it is none."""
    if len(text) > _MOST_BYTES:
        raise InvalidRequestError(
            f"{name} has {len(text)} characters; this server takes {_MOST_BYTES}"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _message(message: object, index: int) -> dict[str, Any]:
    """Fields not known here are the template's."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(
            f"messages[{index}]={message!r:.80} is no message with a role; write e.g. {_MESSAGE}"
        )
    calls, content = message.get("tool_calls") or [], message.get("content")
    if content is None and message["role"] == "assistant":
        content = ""
    plain = {**message, "content": _content(content, index)}
    plain.pop("tool_calls", None)
    if not isinstance(calls, list):
        raise InvalidRequestError(f"messages[{index}].tool_calls is no list; write [{_CALL}]")
    return {**plain, "tool_calls": [_call(call, index) for call in calls]} if calls else plain


def _content(content: object, index: int) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            f"messages[{index}].content={content!r:.80} is not text; send a text, or parts like "
            '{"type": "text", "text": "..."}'
        )
    return "\n".join(str(text) for text in texts)


def _call(call: object, index: int) -> dict[str, Any]:
    """A past call, its arguments as text."""
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") or "" if isinstance(function, dict) else None
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(call, dict) or not isinstance(name, str) or not isinstance(arguments, str):
        raise InvalidRequestError(
            f"messages[{index}].tool_calls has {call!r:.80}; write e.g. {_CALL}"
        )
    function = {"name": name, "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": function}


def _tool(given: object, index: int) -> Tool:
    function = given.get("function") if isinstance(given, dict) else None
    if isinstance(function, dict):
        name, description, parameters = map(function.get, ("name", "description", "parameters"))
        if (
            isinstance(name, str)
            and isinstance(description, str | None)
            and isinstance(parameters, dict | None)
        ):
            return Tool(name, description, parameters, strict=function.get("strict") is True)
    raise InvalidRequestError(f"tools[{index}]={given!r:.80} is no function; write e.g. {_TOOL}")


def _choice(given: object) -> ToolChoice:
    choice = _decoded("tool_choice", given) if isinstance(given, str) else given
    if choice in ("auto", "none", "required"):
        return choice
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequestError(f"tool_choice={given!r:.80} is not known; send {_CHOICE}")
    return NamedTool(name)
