"""Items of an input as they are kept and given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slipstream.server.responses.output import Fields, new_id
from slipstream.server.responses.protocol import Item

# What stands for an answer of no items, so that turns still alternate.
SILENCE: Fields = {"id": new_id("message"), "type": "message", "role": "assistant",
                   "status": "completed", "content": []}  # fmt: skip


def input_items(given: str | Sequence[Item] | None) -> list[Fields]:
    """Items with what the client may leave out: ids, types, statuses and parts."""
    if isinstance(given, str):
        given = [Item(type="message", role="user", content=given)]
    return [_whole(item) for item in given or ()]


def _whole(item: Item) -> Fields:
    told = item.model_dump(exclude_none=True)
    kind = item.type or "message"
    whole = {"id": new_id(kind), "type": kind, "status": "completed", **told}
    if kind == "message" and isinstance(item.content, str):
        whole["content"] = [_part(item.content, said=item.role == "assistant")]
    if kind == "reasoning":
        whole.setdefault("summary", [])
    return whole


def _part(text: str, *, said: bool) -> dict[str, Any]:
    if said:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}
