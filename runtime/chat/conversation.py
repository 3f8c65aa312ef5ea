"""What is said so far, and what is wanted of the turn that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from slipstream.runtime.chat.options import ChatOptions, split_options


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (each with a ``role`` and ``content``), and how a template writes them.

    An assistant's message may hold ``tool_calls``, and one of role ``tool`` answers such a call, in
    OpenAI's shape: every API brings its own into it.

    ``generating``: the assistant's turn is begun; None: unless the last message is gone on with.
    ``going_on``: the last message is not ended, and the model goes on with it. ``variables`` are
    the template's own. ``before``: tokens of an earlier conversation, which this one follows.
    """

    messages: Sequence[Mapping[str, Any]]
    generating: bool | None = None
    going_on: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    options: ChatOptions = field(default_factory=ChatOptions)
    before: Sequence[int] = ()

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> Self:
        """Of what callers in Python give by name: fields of ``ChatOptions``,
        ``add_generation_prompt``, ``continue_final_message``, and variables of the template."""
        options, variables = split_options(given)
        generating = variables.pop("add_generation_prompt", None)
        going_on = variables.pop("continue_final_message", False)
        return cls(messages, generating, going_on, variables, options)
