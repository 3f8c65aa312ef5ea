"""What a caller wants of an assistant's turn beside text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments.

    ``strict``: the arguments are held to the schema while they are written.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The tool that must be called."""

    name: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Tools and thinking of one turn.

    ``thinking``: whether the model thinks before it answers, None: as its template does.
    ``reasoning_effort`` is given to templates that know it. ``thinking_budget`` bounds the tokens
    of the thoughts; the answer follows.
    """

    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice | NamedTool = "auto"
    parallel_tool_calls: bool = True
    thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
