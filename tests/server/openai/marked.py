"""A dialect of the counting model, whose marks are single characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.runtime.chat.events import (
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    OutputParser,
    ReasoningText,
)
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.structured.output import StructuredOutput


@dataclass
class MarkedParser:
    """Thoughts between the first two of ``marks``, calls between the next two with a name up to the
    fifth, else content; spaces are held back."""

    marks: str = "ABCD:"
    _kind: str = ""
    _held: str = ""
    _calls: int = -1
    _named: bool = False

    def push(self, text: str) -> list[Event]:
        """Take more text and return what is now certain."""
        return [event for char in text for event in self._take(char)]

    def finish(self) -> list[Event]:
        """Return what was held back."""
        held, self._held = self._held, ""
        return self._say(held) if held else []

    def _take(self, char: str) -> list[Event]:
        if char in self.marks[:4]:
            self._kind, self._held, self._named = char, "", False
            return []
        if self._kind == self.marks[2]:
            return self._call(char)
        if char == " ":
            self._held += char
            return []
        held, self._held = self._held, ""
        return self._say(held + char)

    def _call(self, char: str) -> list[Event]:
        if self._named:
            return [CallArguments(self._calls, char)]
        if char != self.marks[4]:
            self._held += char
            return []
        self._calls, self._named, name, self._held = self._calls + 1, True, self._held, ""
        return [CallBegin(self._calls, f"call_{self._calls}", name)]

    def _say(self, text: str) -> list[Event]:
        return [ReasoningText(text) if self._kind == self.marks[0] else ContentText(text)]


@dataclass
class MarkedDialect:
    """Remembers what it was asked for."""

    marks: str
    special_tokens: Sequence[str] = ()
    thinks: bool = True
    asked: tuple[ChatOptions, StructuredOutput | None, str] | None = None

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As they are."""
        return [dict(message) for message in messages]

    def tools(self, options: ChatOptions) -> list[dict[str, Any]] | None:
        """Their names."""
        return [{"name": tool.name} for tool in options.tools] or None

    def variables(self, options: ChatOptions) -> dict[str, Any]:
        """None."""
        return {}

    def structured(
        self, options: ChatOptions, wanted: StructuredOutput | None, prompt: str
    ) -> StructuredOutput | None:
        """Free text: the counting model cannot be held to anything else."""
        self.asked = options, wanted, prompt
        return None

    def parser(self, options: ChatOptions, prompt: str) -> OutputParser:
        """A parser of one completion."""
        return MarkedParser(self.marks)
