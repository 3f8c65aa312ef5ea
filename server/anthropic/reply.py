"""The answer to a conversation: one turn of the assistant as blocks, whole or as events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as json_text
from typing import Any, Literal

from pydantic_core import from_json

from slipstream.runtime.chat.events import (
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    ReasoningText,
    joined,
)
from slipstream.runtime.chat.turns import Turns
from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.anthropic.errors import error_body
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage

# Thoughts are told, or only that there were some, or not even that.
Thoughts = Literal["told", "omitted", "hidden"]
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(slots=True)
class MessageReply:
    """The answer to a conversation."""

    model: str
    turns: Turns
    thoughts: Thoughts = "told"
    usage: Usage = field(default_factory=Usage)
    message_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    _begun: bool = False
    _kind: type[Event] | None = None  # of the events of the open block
    _index: int = -1  # of the block
    _last: CompletionOutput | None = None

    def events(self, position: int, output: RequestOutput) -> bytes:
        """The beginning of the message, and of its blocks what is new."""
        self.usage.add_prompt(output, position)
        (completion,) = output.outputs
        if not completion.token_ids and completion.finish_reason is None:
            return b""  # it has not begun
        told = "" if self._begun else self._start()
        self._begun = True
        return (told + "".join(map(self._event, self._take(output, completion)))).encode()

    def end(self) -> bytes:
        """The end of the last block and of the message."""
        delta = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        end = _sse("message_delta", json.dumps(delta, ensure_ascii=False))
        return (self._close() + end + _STOP).encode()

    def error(self, refusal: Refusal) -> bytes:
        """The event in their place."""
        return _sse("error", error_body(refusal).decode()).encode()

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The ``message`` object."""
        (output,) = outputs
        self.usage.add_prompt(output, 0)
        events = self._take(output, output.outputs[0])
        message = self._message(list(self._blocks(events)), self._stop())
        return json.dumps(message, ensure_ascii=False).encode()

    def _take(self, output: RequestOutput, completion: CompletionOutput) -> list[Event]:
        part = self.turns.take(output, completion)
        self.usage.generated += len(completion.token_ids)
        self.usage.reasoning += part.reasoning_tokens
        self._last = completion
        if self.thoughts != "hidden":
            return part.events
        return [event for event in part.events if not isinstance(event, ReasoningText)]

    def _message(self, content: list[Any], stop: dict[str, Any]) -> dict[str, Any]:
        named = {"id": self.message_id, "type": "message", "role": "assistant"}
        return {**named, "model": self.model, "content": content, **stop, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        """Tokens of the prompt that were computed stand apart from those that were remembered."""
        usage = self.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.generated,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }

    def _stop(self) -> dict[str, Any]:
        """Why the turn has ended; a stop string that ended a turn with calls is not told."""
        assert self._last is not None
        reason = _REASONS[self.turns[self._last.index].finish_reason or "stop"]
        text = self._last.stop_reason
        if reason != "end_turn" or not isinstance(text, str):
            return {"stop_reason": reason, "stop_sequence": None}
        return {"stop_reason": "stop_sequence", "stop_sequence": text}

    def _start(self) -> str:
        message = self._message([], {"stop_reason": None, "stop_sequence": None})
        start = {"type": "message_start", "message": message}
        return _sse("message_start", json.dumps(start, ensure_ascii=False))

    def _event(self, event: Event) -> str:
        """The delta of an event, after the beginning of its block if that is a new one."""
        match event:
            case ReasoningText(text):
                opened = self._open(
                    ReasoningText, '{"type":"thinking","thinking":"","signature":""}'
                )
                delta = f'"type":"thinking_delta","thinking":{json_text(text)}'
                return opened + (self._delta(delta) if self.thoughts == "told" else "")
            case ContentText(text):
                opened = self._open(ContentText, '{"type":"text","text":""}')
                return opened + self._delta(f'"type":"text_delta","text":{json_text(text)}')
            case CallBegin(_, call_id, name):
                call = f'"id":{json_text(call_id)},"name":{json_text(name)},"input":{{}}'
                return self._open(CallBegin, f'{{"type":"tool_use",{call}}}')
            case CallArguments(_, text):
                return self._delta(f'"type":"input_json_delta","partial_json":{json_text(text)}')

    def _open(self, kind: type[Event], block: str) -> str:
        """Begin a block, unless what is open goes on; every call is a block."""
        if self._kind is kind and kind is not CallBegin:
            return ""
        closed = self._close()
        self._kind, self._index = kind, self._index + 1
        start = f'"type":"content_block_start","index":{self._index},"content_block":{block}'
        return closed + _sse("content_block_start", f"{{{start}}}")

    def _close(self) -> str:
        if self._kind is None:
            return ""
        signed = ""
        if self._kind is ReasoningText:
            signed = self._delta(f'"type":"signature_delta","signature":"{self.message_id}"')
        self._kind = None
        stop = f'{{"type":"content_block_stop","index":{self._index}}}'
        return signed + _sse("content_block_stop", stop)

    def _delta(self, delta: str) -> str:
        event = f'{{"type":"content_block_delta","index":{self._index},"delta":{{{delta}}}}}'
        return _sse("content_block_delta", event)

    def _blocks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """The blocks of a whole turn, where events that follow each other are of another kind."""
        call: dict[str, Any] | None = None
        arguments = ""
        for event in joined(events):  # texts meet where thoughts between them are hidden
            if call is not None and not isinstance(event, CallArguments):
                yield {**call, "input": _input(arguments)}
                call, arguments = None, ""
            match event:
                case ReasoningText(text):
                    told = text if self.thoughts == "told" else ""
                    yield {"type": "thinking", "thinking": told, "signature": self.message_id}
                case ContentText(text):
                    yield {"type": "text", "text": text}
                case CallBegin(_, call_id, name):
                    call = {"type": "tool_use", "id": call_id, "name": name}
                case CallArguments(_, text):
                    arguments += text
        if call is not None:
            yield {**call, "input": _input(arguments)}


def _input(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments are; of one that was cut off, what there is of it."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sse(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


_STOP = _sse("message_stop", '{"type":"message_stop"}')
