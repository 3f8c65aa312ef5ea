"""Messages to prompts, in the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.text.tokenizer import Tokenizer

_RESERVED = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}
)


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
    return tokenizer.apply_chat_template(
        conversation.messages,
        conversation.generating,
        continue_final_message=conversation.going_on,
        **conversation.variables,
    )
