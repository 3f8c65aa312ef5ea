"""OpenAI's messages as a conversation that a chat template can write."""

from __future__ import annotations

from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.server.core.conversation import Conversation
from slipstream.server.openai.protocol import ChatMessage, ContentPart, Templated

# Of turns with tools or sound; clients send them empty with every turn of the past.
_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "audio")


def conversation_of(request: Templated) -> Conversation:
    """The conversation of a request; raises ``InvalidRequestError`` for what no template knows."""
    return Conversation(
        [_plain(message, index) for index, message in enumerate(request.messages or ())],
        generating=request.add_generation_prompt,
        going_on=bool(request.continue_final_message),
        variables=request.chat_template_kwargs or {},
    )


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    extra = dict(message.model_extra or {})
    for name in _UNSUPPORTED:
        if extra.pop(name, None):
            raise InvalidRequestError(
                f"messages[{index}].{name} is not supported by this server; leave it out",
                param="messages",
            )
    content = message.content
    if content is None and message.role == "assistant":
        content = message.refusal or ""  # a turn that refused has its text there
    if content is None:
        raise InvalidRequestError(
            f"messages[{index}].content is missing; give a text", param="messages"
        )
    return {**extra, "role": message.role, "content": _text(content, index)}


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
