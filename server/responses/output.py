"""The items of an answer, and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from slipstream.runtime.chat.events import (
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    ReasoningText,
)

Kind = Literal["reasoning", "message", "function_call"]
Status = Literal["in_progress", "completed", "incomplete"]
# An event without its number.
Fields = dict[str, Any]

_PREFIXES: dict[Kind, str] = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}
_TEXTS: dict[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


@dataclass(slots=True)
class OutputItem:
    """Thoughts, a text, or a call of a tool, whose arguments ``text`` then is."""

    kind: Kind
    call_id: str = ""
    name: str = ""
    text: str = ""
    status: Status = "in_progress"
    item_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.item_id = _PREFIXES[self.kind] + self.item_id

    def part(self, text: str) -> Fields:
        """The one part of its content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def json(self) -> Fields:
        """The item; one that has just begun has no parts."""
        head = {"id": self.item_id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if self.status == "in_progress" else [self.part(self.text)]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content, "encrypted_content": None}
        return {**head, "role": "assistant", "content": content}


class Output:
    """The items so far; the last may be open, and what is new goes on with it if it is alike."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []

    def take(self, event: Event) -> Iterator[Fields]:
        """The events that tell of what is new."""
        match event:
            case ReasoningText(text):
                yield from self._more("reasoning", text)
            case ContentText(text):
                yield from self._more("message", text)
            case CallBegin(_, call_id, name):
                yield from self._begin(OutputItem("function_call", call_id, name))
            case CallArguments(_, text):
                yield self._delta(text)

    def close(self, status: Status) -> Iterator[Fields]:
        """The events that end the last item."""
        if not self.items or self.items[-1].status != "in_progress":
            return
        item = self.items[-1]
        item.status, where = status, self._where()
        if item.kind == "function_call":
            done = {"name": item.name, "arguments": item.text}
            yield {"type": f"{_TEXTS[item.kind]}.done", **where, **done}
        else:
            told = {"text": item.text, **self._scores(item)}
            yield {"type": f"{_TEXTS[item.kind]}.done", **where, "content_index": 0, **told}
            part = {"content_index": 0, "part": item.part(item.text)}
            yield {"type": "response.content_part.done", **where, **part}
        index = len(self.items) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item.json()}

    def json(self) -> list[Fields]:
        """All items."""
        return [item.json() for item in self.items]

    def _more(self, kind: Kind, text: str) -> Iterator[Fields]:
        if not self.items or self.items[-1].kind != kind:
            yield from self._begin(OutputItem(kind))
        yield self._delta(text)

    def _begin(self, item: OutputItem) -> Iterator[Fields]:
        yield from self.close("completed")
        self.items.append(item)
        index = len(self.items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": item.json()}
        if item.kind != "function_call":
            part = {"content_index": 0, "part": item.part("")}
            yield {"type": "response.content_part.added", **self._where(), **part}

    def _delta(self, text: str) -> Fields:
        item = self.items[-1]
        item.text += text
        place = {} if item.kind == "function_call" else {"content_index": 0}
        told = {"delta": text, **self._scores(item)}
        return {"type": f"{_TEXTS[item.kind]}.delta", **self._where(), **place, **told}

    def _where(self) -> Fields:
        return {"item_id": self.items[-1].item_id, "output_index": len(self.items) - 1}

    @staticmethod
    def _scores(item: OutputItem) -> Fields:
        """Texts have log probabilities, of which none are told."""
        return {"logprobs": []} if item.kind == "message" else {}
