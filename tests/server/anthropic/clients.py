"""Anthropic's own client for a server of these tests, and what a stream of it joins to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import anthropic
from tests.server.openai.serving import Running

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
_OPEN: list[anthropic.Anthropic] = []


def client(running: Running, **options: Any) -> anthropic.Anthropic:  # noqa: ANN401
    """The client, which is open to the end of the test; it does not repeat what fails."""
    given = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
    made = anthropic.Anthropic(base_url=running.url, **given)
    _OPEN.append(made)
    return made


def close_clients() -> None:
    """Close those that were made."""
    while _OPEN:
        _OPEN.pop().close()


def joined(events: Iterable[Any]) -> dict[str, Any]:
    """The message that raw events make, with the text of calls' input; checks their order."""
    message: dict[str, Any] = {}
    opened: list[int] = []
    for event in events:
        if event.type == "message_start":
            assert not message and event.message.content == []
            message = {"id": event.message.id, "content": [], "started": event.message.usage}
        elif event.type == "content_block_start":
            assert not opened and event.index == len(message["content"])
            opened.append(event.index)
            message["content"].append({**event.content_block.model_dump(), "json": ""})
        elif event.type == "content_block_delta":
            assert opened == [event.index]
            _add(message["content"][-1], event.delta)
        elif event.type == "content_block_stop":
            assert opened.pop() == event.index
        elif event.type == "message_delta":
            message |= {"usage": event.usage, "stop_reason": event.delta.stop_reason}
            message["stop_sequence"] = event.delta.stop_sequence
        else:
            assert event.type == "message_stop" and "usage" in message and not opened
            message["stopped"] = True
    assert message.pop("stopped")
    return message


def _add(block: dict[str, Any], delta: Any) -> None:  # noqa: ANN401 - the client's types
    fields = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json",
              "signature_delta": "signature"}  # fmt: skip
    field = fields[delta.type]
    block[field] += getattr(delta, "partial_json" if field == "json" else field)
