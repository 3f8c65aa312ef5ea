"""Messages to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.openai.protocol import (
    ChatMessage,
    ContentPart,
    Conversation,
    TokenizeRequest,
)

_RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt"})
_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation in the model's template; ``token_ids`` are those of ``text``."""

    text: str
    token_ids: list[int]


def chat_prompt(
    tokenizer: Tokenizer, request: Conversation | TokenizeRequest, add_special_tokens: bool | None
) -> ChatPrompt:
    """Render and encode a conversation; raises ``InvalidRequestError``.

    Templates write special tokens themselves, so none are added unless asked for.
    """
    text = _render(tokenizer, request)
    return ChatPrompt(text, tokenizer.encode(text, add_special_tokens=bool(add_special_tokens)))


def _render(tokenizer: Tokenizer, request: Conversation | TokenizeRequest) -> str:
    variables = request.chat_template_kwargs or {}
    reserved = sorted(_RESERVED & variables.keys())
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs holds {', '.join(reserved)}; use the field of the request"
        )
    messages = [_plain(message, index) for index, message in enumerate(request.messages or ())]
    going_on = bool(request.continue_final_message)
    generating = not going_on
    if request.add_generation_prompt is not None:
        generating = request.add_generation_prompt
    if going_on and generating:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true; leave one out"
        )
    text = tokenizer.apply_chat_template(messages, generating, **variables)
    return _cut_after_last(text, messages) if going_on else text


def _cut_after_last(text: str, messages: Sequence[dict[str, Any]]) -> str:
    """``text`` up to the end of the last message's content, which the model is to go on with."""
    content = messages[-1]["content"]
    # Templates often strip what they are given.
    for ending in (content, content.rstrip(), content.strip()):
        position = text.rfind(ending)
        if position >= 0:
            return text[: position + len(ending)]
    raise InvalidRequestError(
        "continue_final_message is true, but this model's chat template does not show the last "
        "message as it is; leave it out"
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
    # OpenAI's newer name for instructions, which templates do not know.
    role = "system" if message.role == "developer" else message.role
    return {**extra, "role": role, "content": _text(message.content, index)}


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
