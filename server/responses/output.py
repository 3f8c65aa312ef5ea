"""The items of an answer, and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
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

_PREFIXES = {
    "reasoning": "rs_",
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
}
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
    scores: list[Fields] = field(default_factory=list)  # of a text
    item_id: str = ""

    def __post_init__(self) -> None:
        self.item_id = new_id(self.kind)

    def part(self, text: str, scores: Sequence[Fields]) -> Fields:
        """The one part of its content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}

    def json(self) -> Fields:
        """The item; one that has just begun has no parts."""
        head = {"id": self.item_id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if self.status == "in_progress" else [self.part(self.text, self.scores)]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content, "encrypted_content": None}
        return {**head, "role": "assistant", "content": content}


class Output:
    """The items so far; the last may be open, and what is new goes on with it if it is alike."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []

    def take(self, event: Event, scores: Sequence[Fields] = ()) -> Iterator[Fields]:
        """The events that tell of what is new; ``scores`` are those of a text's tokens."""
        match event:
            case ReasoningText(text):
                yield from self._more("reasoning", text)
            case ContentText(text):
                yield from self._more("message", text, scores)
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
            told = {"text": item.text, **_scored(item, item.scores)}
            yield {"type": f"{_TEXTS[item.kind]}.done", **where, "content_index": 0, **told}
            part = {"content_index": 0, "part": item.part(item.text, item.scores)}
            yield {"type": "response.content_part.done", **where, **part}
        index = len(self.items) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item.json()}

    def json(self) -> list[Fields]:
        """All items."""
        return [item.json() for item in self.items]

    def score(self, scores: Sequence[Fields]) -> Iterator[Fields]:
        """Tell of tokens without a text, such as one that ends a turn, if a text is open."""
        if scores and self.items and self.items[-1].kind == "message":
            yield self._delta("", scores)

    def _more(self, kind: Kind, text: str, scores: Sequence[Fields] = ()) -> Iterator[Fields]:
        if not self.items or self.items[-1].kind != kind:
            yield from self._begin(OutputItem(kind))
        yield self._delta(text, scores)

    def _begin(self, item: OutputItem) -> Iterator[Fields]:
        yield from self.close("completed")
        self.items.append(item)
        index = len(self.items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": item.json()}
        if item.kind != "function_call":
            part = {"content_index": 0, "part": item.part("", [])}
            yield {"type": "response.content_part.added", **self._where(), **part}

    def _delta(self, text: str, scores: Sequence[Fields] = ()) -> Fields:
        item = self.items[-1]
        item.text += text
        item.scores += scores
        place = {} if item.kind == "function_call" else {"content_index": 0}
        told = {"delta": text, **_scored(item, scores)}
        return {"type": f"{_TEXTS[item.kind]}.delta", **self._where(), **place, **told}

    def _where(self) -> Fields:
        return {"item_id": self.items[-1].item_id, "output_index": len(self.items) - 1}


def _scored(item: OutputItem, scores: Sequence[Fields]) -> Fields:
    """Texts have log probabilities, where they were asked for."""
    return {"logprobs": scores} if item.kind == "message" else {}


def new_id(kind: str) -> str:
    """An id of an item."""
    return _PREFIXES.get(kind, "item_") + uuid.uuid4().hex
