"""The answer to a request: one object, or events that end with it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.runtime.chat.events import ContentText, Event
from slipstream.runtime.chat.turns import Turns
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import RequestOutput
from slipstream.server.core.dump import dump
from slipstream.server.core.logprobs import TokenTexts, scored_token
from slipstream.server.core.refusal import Kind, Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.responses.output import Fields, Output, Status

_CODES: dict[Kind, str] = {"busy": "rate_limit_exceeded", "invalid": "invalid_prompt"}


@dataclass(slots=True)
class ResponseReply:
    """The answer; ``frame`` is what is known of it before.

    ``keep`` is given the object, as JSON, when it is whole.
    """

    frame: Fields
    turns: Turns
    texts: TokenTexts
    keep: Callable[[bytes], None]
    usage: Usage = field(default_factory=Usage)
    _output: Output = field(default_factory=Output)
    _told: int = 0

    def events(self, position: int, output: RequestOutput) -> bytes:
        """An event for everything that is new."""
        return self._opening() + b"".join(map(self._event, self._take(output)))

    def end(self) -> bytes:
        """The event that holds all of the answer."""
        status = self._status()
        closing = b"".join(map(self._event, self._output.close(status)))
        whole = self._whole(status)
        return closing + self._framed(f"response.{status}", whole)

    def error(self, refusal: Refusal) -> bytes:
        """The events in their place."""
        told = {"code": refusal.code, "message": refusal.message, "param": refusal.param}
        code = _CODES.get(refusal.kind, "server_error")
        failed = {"status": "failed", "error": {"code": code, "message": refusal.message}}
        opening = self._opening() + self._event({"type": "error", **told})
        return opening + self._framed("response.failed", dump(self._object(failed)))

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The ``response`` object."""
        for output in outputs:
            _exhaust(self._take(output))
        status = self._status()
        _exhaust(self._output.close(status))
        return self._whole(status)

    def _take(self, output: RequestOutput) -> Iterable[Fields]:
        self.usage.add_prompt(output, 0)
        for completion in output.outputs:
            part = self.turns.take(output, completion)
            self.usage.generated += len(completion.token_ids)
            self.usage.reasoning += part.reasoning_tokens
            scores = deque(part.logprobs)
            for event in part.events:
                yield from self._output.take(event, self._scores(event, scores))
            yield from self._output.score([scored_token(entry, self.texts) for entry in scores])

    def _scores(self, event: Event, ahead: deque[TokenLogprobs]) -> list[Fields]:
        """Those of a text's tokens, the first of ``ahead``: a token that two texts share goes with
        the former."""
        taken: list[Fields] = []
        text = event.text.encode() if isinstance(event, ContentText) else b""
        while ahead and text:
            entry = ahead.popleft()
            text = _after(text, bytes(self.texts.bytes(entry.token_id)))
            taken.append(scored_token(entry, self.texts))
        return taken

    def _status(self) -> Status:
        return "incomplete" if self.turns[0].finish_reason == "length" else "completed"

    def _whole(self, status: Status) -> bytes:
        ended: dict[str, Any] = {"status": status, "usage": _usage_json(self.usage)}
        if status == "completed":
            ended["completed_at"] = int(time.time())
        else:
            ended["incomplete_details"] = {"reason": "max_output_tokens"}
        whole = dump(self._object(ended))
        self.keep(whole)
        return whole

    def _object(self, changed: Fields) -> Fields:
        return {**self.frame, "output": self._output.json(), **changed}

    def _opening(self) -> bytes:
        """What a stream begins with."""
        if self._told:
            return b""
        begun = dump(self._object({}))
        created = self._framed("response.created", begun)
        return created + self._framed("response.in_progress", begun)

    def _event(self, event: Fields) -> bytes:
        told = dump({**event, "sequence_number": self._number()})
        return f"event: {event['type']}\ndata: ".encode() + told + b"\n\n"

    def _framed(self, kind: str, response: bytes) -> bytes:
        """The event of a whole object, given as JSON."""
        head = f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{self._number()}'
        return head.encode() + b',"response":' + response + b"}\n\n"

    def _number(self) -> int:
        self._told += 1
        return self._told - 1


def _after(text: bytes, token: bytes) -> bytes:
    """What follows a token in a text that begins with it, or with the end of it; a special token
    has no text."""
    for start in range(len(token)):
        part = token[start:]
        if text.startswith(part) or part.startswith(text):
            return text[len(part) :]
    return text


def _exhaust(events: Iterable[Fields]) -> None:
    for _ in events:
        pass


def _usage_json(usage: Usage) -> Fields:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.generated,
    }
