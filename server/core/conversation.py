"""Messages to prompts, in the model's chat template and dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.text.length import check_length, texts_of
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.limits import check_tools

_RESERVED = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (each with a ``role`` and ``content`` that is text), and how a template writes them.

    An assistant's message may hold ``tool_calls``, and one of role ``tool`` answers such a call, in
    OpenAI's shape: every API brings its own into it.

    ``generating``: the assistant's turn is begun; None: unless the last message is gone on with.
    ``going_on``: the last message is not ended, and the model goes on with it. ``variables`` are
    the template's own. ``before``: tokens of an earlier conversation, which this one follows.
    """

    messages: Sequence[dict[str, Any]]
    generating: bool | None = None
    going_on: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    options: ChatOptions = field(default_factory=ChatOptions)
    before: Sequence[int] = ()


def render(
    tokenizer: Tokenizer, dialect: Dialect, conversation: Conversation, max_seq_len: int
) -> str:
    """The text of a conversation in the model's template; raises ``InvalidRequestError``, and
    ``ContextLengthError`` for more than ``max_seq_len`` tokens can hold."""
    options = conversation.options
    reserved = sorted(_RESERVED & conversation.variables.keys())
    if reserved:
        raise InvalidRequestError(
            f"chat_template_kwargs holds {', '.join(reserved)}; use the field of the request",
            param="chat_template_kwargs",
        )
    check_tools(options.tools)
    check_length(tokenizer, _texts(conversation), max_seq_len)
    text = tokenizer.apply_chat_template(
        dialect.messages(conversation.messages),
        conversation.generating,
        dialect.tools(options),
        continue_final_message=conversation.going_on,
        **{**dialect.variables(options), **conversation.variables},
    )
    check_length(tokenizer, [text], max_seq_len)  # with roles, names and variables
    return text


def _texts(conversation: Conversation) -> Iterator[str]:
    yield from texts_of(conversation.messages)
    for tool in conversation.options.tools:
        yield tool.description or ""
        yield json.dumps(tool.parameters or {}, ensure_ascii=False, separators=(",", ":"))
