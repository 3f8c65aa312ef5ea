"""What a caller wants of an assistant's turn beside text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from slipstream.errors import InvalidRequestError


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
class AllowedTools:
    """Those of the tools that may be called, while the model is shown all: its prompt, and what is
    remembered of it, stays the same. ``required``: one must be called."""

    names: Sequence[str]
    required: bool = False


ToolChoice = Literal["auto", "none", "required"] | NamedTool | AllowedTools


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Tools and thinking of one turn.

    ``thinking``: whether the model thinks before it answers, None: as its template does.
    ``reasoning_effort`` is given to templates that know it. ``thinking_budget`` bounds the tokens
    of the thoughts; the answer follows.
    """

    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call."""
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return choice.required
        return isinstance(choice, NamedTool) or choice == "required"


def split_options(given: Mapping[str, Any]) -> tuple[ChatOptions, dict[str, Any]]:
    """Options by name, and the rest; tools may be in OpenAI's shape, and a choice a tool's name."""
    names = {field.name for field in fields(ChatOptions)}
    rest = {name: value for name, value in given.items() if name not in names}
    chosen = {name: given[name] for name in names if given.get(name) is not None}
    tools = [_tool(tool) for tool in chosen.get("tools", ())]
    choice = chosen.get("tool_choice", "auto")
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        choice = NamedTool(choice)
    return ChatOptions(**{**chosen, "tools": tools, "tool_choice": choice}), rest


def _tool(given: object) -> Tool:
    if isinstance(given, Tool):
        return given
    function = given.get("function", given) if isinstance(given, Mapping) else None
    try:
        known = {field.name for field in fields(Tool)}
        return Tool(**{k: v for k, v in dict(function or {}).items() if k in known})
    except (TypeError, ValueError):
        raise InvalidRequestError(
            f"a tool is {given!r:.80}; use e.g. Tool('f', 'What it does.', {{'type': 'object'}}), "
            "or that in OpenAI's shape",
            param="tools",
        ) from None
