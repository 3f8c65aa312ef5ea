"""OpenAI's messages as a conversation that a chat template can write."""

from __future__ import annotations

from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.server.core.conversation import Conversation
from slipstream.server.openai.protocol import ChatMessage, ContentPart, Templated

_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio")


def conversation_of(request: Templated) -> Conversation:
    """The conversation of a request; raises ``InvalidRequestError`` for what no template knows."""
    return Conversation(
        [_plain(message, index) for index, message in enumerate(request.messages or ())],
        generating=request.add_generation_prompt,
        going_on=bool(request.continue_final_message),
        variables=request.chat_template_kwargs or {},
    )


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    extra = message.model_extra or {}
    for name in _TOOL_FIELDS:
        if extra.get(name) is not None:
            raise InvalidRequestError(
                f"messages[{index}].{name} is not supported by this server; leave it out"
            )
    if message.content is None:
        raise InvalidRequestError(f"messages[{index}].content is missing; give a text")
    return {**extra, "role": message.role, "content": _text(message.content, index)}


def _text(content: str | list[ContentPart], index: int) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text" or part.text is None:
            raise InvalidRequestError(
                f"messages[{index}].content has a part of type {part.type!r:.40}; this server "
                "takes parts like {'type': 'text', 'text': '...'} only"
            )
    return "\n".join(part.text or "" for part in content)
