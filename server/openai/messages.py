"""OpenAI's messages, tools and fields of thinking as a conversation."""

from __future__ import annotations

import json
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.options import AllowedTools, ChatOptions, NamedTool, Tool, ToolChoice
from slipstream.server.openai.protocol import (
    AllowedChoice,
    ChatMessage,
    ChatRequest,
    ChatTool,
    ContentPart,
    MessageCall,
    NamedChoice,
    Templated,
)

# Clients send them empty with every turn of the past.
_UNSUPPORTED = ("function_call", "audio")


def conversation_of(request: Templated) -> Conversation:
    """The conversation of a request; raises ``InvalidRequestError`` for what no template knows."""
    return Conversation(
        [_plain(message, index) for index, message in enumerate(request.messages or ())],
        generating=request.add_generation_prompt,
        going_on=bool(request.continue_final_message),
        variables=_variables(request),
        options=_options(request),
    )


def _variables(request: Templated) -> dict[str, Any]:
    given = request.chat_template_kwargs or {}
    return given if request.documents is None else {"documents": request.documents, **given}


def _options(request: Templated) -> ChatOptions:
    effort = request.reasoning_effort
    parallel = budget = None
    if isinstance(request, ChatRequest):
        parallel, budget = request.parallel_tool_calls, request.thinking_token_budget
    return ChatOptions(
        tools=[_tool(tool) for tool in request.tools or ()],
        tool_choice=_choice(request),
        parallel_tool_calls=parallel is not False,
        thinking=None if effort is None else effort != "none",
        reasoning_effort=effort,
        thinking_budget=None if budget == -1 else budget,
    )


def _tool(tool: ChatTool) -> Tool:
    function = tool.function
    return Tool(
        function.name, function.description, function.parameters, strict=bool(function.strict)
    )


def _choice(request: Templated) -> ToolChoice:
    choice = request.tool_choice
    if isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        names = [tool.function.name for tool in allowed.tools]
        return AllowedTools(names, required=allowed.mode == "required")
    return NamedTool(choice.function.name) if isinstance(choice, NamedChoice) else choice or "auto"


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    extra = dict(message.model_extra or {})
    for name in _UNSUPPORTED:
        if extra.pop(name, None):
            raise InvalidRequestError(
                f"messages[{index}].{name} is not supported by this server; leave it out",
                param="messages",
            )
    if message.tool_calls:
        extra["tool_calls"] = [_call(call) for call in message.tool_calls]
    content = message.content
    if content is None and message.role == "assistant":
        content = message.refusal or ""  # a turn that refused has its text there
    if content is None:
        raise InvalidRequestError(
            f"messages[{index}].content is missing; give a text", param="messages"
        )
    return {**extra, "role": message.role, "content": _text(content, index)}


def _call(call: MessageCall) -> dict[str, Any]:
    """A past call, its arguments as text."""
    arguments = call.function.arguments or ""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _text(content: str | list[ContentPart], index: int) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, index) for part in content)


def _part_text(part: ContentPart, index: int) -> str:
    texts = {"text": part.text, "refusal": part.refusal}
    text = texts.get(part.type)
    if text is None and part.type in texts:
        raise InvalidRequestError(
            f"messages[{index}].content has a part of type {part.type!r:.80} without its text; "
            f"give '{part.type}'",
            param="messages",
        )
    if text is None:
        raise InvalidRequestError(
            f"messages[{index}].content has a part of type {part.type!r:.40}, which is not "
            "supported by this server; it takes parts like {'type': 'text', 'text': '...'} only",
            param="messages",
        )
    return text
