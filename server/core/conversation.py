"""Messages to prompts, in the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.text.tokenizer import Tokenizer

_RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (each with a ``role`` and ``content`` that is text), and how a template writes them.

    ``generating``: the assistant's turn is begun; None: unless the last message is gone on with.
    ``going_on``: the last message is not ended, and the model goes on with it. ``variables`` are
    the template's own.
    """

    messages: Sequence[dict[str, Any]]
    generating: bool | None = None
    going_on: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def render(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """The text of a conversation in the model's template; raises ``InvalidRequestError``."""
    reserved = sorted(_RESERVED & conversation.variables.keys())
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs holds {', '.join(reserved)}; use the field of the request",
            param="chat_template_kwargs",
        )
    going_on, generating = conversation.going_on, conversation.generating
    if generating is None:
        generating = not going_on
    if going_on and generating:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true; leave one out",
            param="continue_final_message",
        )
    messages = conversation.messages
    text = tokenizer.apply_chat_template(messages, generating, **conversation.variables)
    return _cut_after_last(text, messages) if going_on else text


def _cut_after_last(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """``text`` up to the end of the last message's content, which the model is to go on with."""
    content = messages[-1]["content"]
    # Templates often strip what they are given.
    for ending in (content, content.rstrip(), content.strip()):
        position = text.rfind(ending)
        if position >= 0:
            return text[: position + len(ending)]
    raise InvalidRequestError(
        "continue_final_message is true, but this model's chat template does not show the last "
        "message as it is; leave it out",
        param="continue_final_message",
    )
