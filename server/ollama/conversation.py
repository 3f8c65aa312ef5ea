"""Ollama's messages, tools and thinking as a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.options import ChatOptions, Tool
from slipstream.server.core.dump import dump
from slipstream.server.core.refusal import Refusal
from slipstream.server.ollama.protocol import (
    GenerateRequest,
    OllamaCall,
    OllamaChatRequest,
    OllamaMessage,
    OllamaTool,
    Think,
)


def conversation_of(request: OllamaChatRequest, dialect: Dialect) -> Conversation:
    """The conversation of a chat; the last message is gone on with if the assistant said it.

    Raises ``Refusal`` for thoughts of a model that has none.
    """
    given = request.messages or []
    options = _options(request.think, dialect, [_tool(tool) for tool in request.tools or ()])
    last = given[-1]
    going_on = last.role == "assistant" and bool(last.content) and not last.tool_calls
    return Conversation(_Messages().all(given), going_on=going_on, options=options)


def question_of(request: GenerateRequest, dialect: Dialect) -> Conversation:
    """A prompt as the one question of a conversation, or as the next of the request's context."""
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": request.system})
    messages.append({"role": "user", "content": request.prompt})
    options = _options(request.think, dialect)
    return Conversation(messages, options=options, before=request.context or ())


def _options(think: Think, dialect: Dialect, tools: Sequence[Tool] = ()) -> ChatOptions:
    # Clients know these words.
    if think and not dialect.thinks:
        raise Refusal("invalid", "this model does not support thinking; leave think out")
    if tools and not knows_tools(dialect):
        raise Refusal("invalid", "this model does not support tools; leave tools out")
    effort = think if isinstance(think, str) else None
    return ChatOptions(
        tools, thinking=None if think is None else bool(think), reasoning_effort=effort
    )


def knows_tools(dialect: Dialect) -> bool:
    """Whether a model can be given tools."""
    try:
        return (
            dialect.tools(ChatOptions([Tool("f", "A function.", {"type": "object"})])) is not None
        )
    except InvalidRequestError:
        return False


def _tool(tool: OllamaTool) -> Tool:
    function = tool.function
    return Tool(function.name, function.description, function.parameters)


class _Messages:
    """Messages in OpenAI's shape; calls are named, which Ollama's need not be, and so are their
    answers, by the tool or by their order."""

    def __init__(self) -> None:
        self._calls = 0
        self._open: list[tuple[str, str]] = []  # ids and names of calls without an answer

    def all(self, messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
        """The same messages."""
        return [self._one(message) for message in messages]

    def _one(self, message: OllamaMessage) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            plain["reasoning_content"] = message.thinking
        if message.tool_calls:
            self._open = []
            plain["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.role == "tool":
            plain |= self._answered(message)
        return plain

    def _call(self, call: OllamaCall) -> dict[str, Any]:
        name, arguments = call.function.name, call.function.arguments or {}
        text = arguments if isinstance(arguments, str) else dump(arguments).decode()
        call_id = call.id or f"call_{self._calls}"
        self._calls += 1
        self._open.append((call_id, name))
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}

    def _answered(self, message: OllamaMessage) -> dict[str, Any]:
        """Which call a message answers, and of which tool."""
        given = (message.tool_call_id, message.tool_name)
        fitting = (
            c for c in self._open if all(g in (None, "", o) for g, o in zip(given, c, strict=True))
        )
        found = next(fitting, None)
        if found is not None:
            self._open.remove(found)
        names = zip(("tool_call_id", "name"), found or given, strict=True)
        return {name: value for name, value in names if value}
