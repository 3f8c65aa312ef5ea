"""What an assistant's turn is made of, piece by piece as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """More of what it says."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The beginning of the call number ``index`` of a tool; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the call number ``index``; joined they are one JSON object."""

    index: int
    text: str


Event = ReasoningText | ContentText | CallBegin | CallArguments


class OutputParser(Protocol):
    """Splits the text of one completion into events; how the text comes in pieces changes nothing
    but where the events are cut."""

    def push(self, text: str) -> list[Event]:
        """Take more text and return what is now certain."""
        ...

    def finish(self) -> list[Event]:
        """Return what was held back; a call that is broken off or malformed comes as content."""
        ...


@dataclass(slots=True)
class ToolCall:
    """A call of a tool; ``arguments`` is a JSON object as text."""

    call_id: str
    name: str
    arguments: str = ""

    def in_message(self) -> dict[str, Any]:
        """One of the ``tool_calls`` of a message in OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class AssistantTurn:
    """A whole turn: the sum of its events."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Append an event."""
        match event:
            case ReasoningText(text):
                self.reasoning += text
            case ContentText(text):
                self.content += text
            case CallBegin(_, call_id, name):
                self.calls.append(ToolCall(call_id, name))
            case CallArguments(index, text):
                self.calls[index].arguments += text


def joined(events: Iterable[Event]) -> list[Event]:
    """The same with fewer events: neighbours of a kind are one."""
    made: list[Event] = []
    for event in events:
        match made[-1] if made else None, event:
            case (ContentText(before), ContentText(text)):
                made[-1] = ContentText(before + text)
            case (ReasoningText(before), ReasoningText(text)):
                made[-1] = ReasoningText(before + text)
            case (CallArguments(of, before), CallArguments(index, text)) if of == index:
                made[-1] = CallArguments(index, before + text)
            case _:
                made.append(event)
    return made
