"""The answer of a model: lines of JSON as they come, or one object."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from slipstream.runtime.chat.events import (
    CallArguments,
    CallBegin,
    ContentText,
    ReasoningText,
    ToolCall,
)
from slipstream.runtime.chat.turns import Part, Turns
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import CompletionOutput, RequestMetrics, RequestOutput
from slipstream.server.core.dump import dump
from slipstream.server.core.http.respond import StreamForm
from slipstream.server.core.logprobs import TokenTexts, scored_token
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.ollama.errors import error_body

# Clients read every line as an object, so nothing can be sent while there is nothing to tell.
LINES = StreamForm("application/x-ndjson")
GENERATED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: lines of JSON, or one object with `stream` false.",
        "content": {"application/x-ndjson": {}, "application/json": {}},
    }
}


@dataclass(slots=True)
class Said:
    """What is said at once."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


def as_message(said: Said) -> dict[str, Any]:
    """The fields of ``/api/chat``."""
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.thinking:
        message["thinking"] = said.thinking
    if said.calls:
        message["tool_calls"] = said.calls
    return {"message": message}


def as_response(said: Said) -> dict[str, Any]:
    """The fields of ``/api/generate``."""
    thinking = {"thinking": said.thinking} if said.thinking else {}
    return {"response": said.content, **thinking}


def loaded(model: str, fields: Mapping[str, Any]) -> bytes:
    """The answer to a request without a prompt, which asks for the model to be loaded."""
    return dump({**_head(model), **fields, "done": True, "done_reason": "load"})


@dataclass(slots=True)
class OllamaReply:
    """The answer of a model; ``shape`` makes the fields of a line.

    ``turns``: where text becomes thoughts and calls; None: it is told as it is. ``context``: where
    all tokens are gathered, which the next prompt may go on with; None: they are not told.
    """

    model: str
    texts: TokenTexts
    shape: Callable[[Said], dict[str, Any]]
    turns: Turns | None = None
    context: list[int] | None = None
    usage: Usage = field(default_factory=Usage)
    _begun: int = 0  # calls
    _told: int = 0

    def events(self, position: int, output: RequestOutput) -> bytes:
        """Lines for what is new."""
        (completion,) = output.outputs
        self.usage.add(output, position)
        part = self._take(output, completion)
        ended = completion.finish_reason is not None
        lines = [self.shape(said) for said in self._pieces(part, ended=ended)]
        if part.logprobs:
            lines = lines or [self.shape(Said())]
            lines[-1]["logprobs"] = self._logprobs(part.logprobs)
        told = [{**_head(self.model), **line, "done": False} for line in lines]
        if ended:
            told.append({**_head(self.model), **self.shape(Said()), **self._end(completion)})
        return b"".join(dump(line) + b"\n" for line in told)

    def end(self) -> bytes:
        """Nothing: the last line was with the last output."""
        return b""

    def error(self, refusal: Refusal) -> bytes:
        """The line in its place."""
        return error_body(refusal) + b"\n"

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The one object."""
        (output,) = outputs
        (completion,) = output.outputs
        self.usage.add(output)
        part, said = self._take(output, completion), Said()
        for piece in self._pieces(part, ended=True):
            said.content += piece.content
            said.thinking += piece.thinking
            said.calls += piece.calls
        answer = {**_head(self.model), **self.shape(said), **self._end(completion)}
        if part.logprobs:
            answer["logprobs"] = self._logprobs(part.logprobs)
        return dump(answer)

    def _take(self, output: RequestOutput, completion: CompletionOutput) -> Part:
        if self.context is not None:
            self.context += [] if self.context else output.prompt_token_ids
            self.context += completion.token_ids
        if self.turns is not None:
            return self.turns.take(output, completion)
        events = [ContentText(completion.text)] if completion.text else []
        return Part([*events], completion.logprobs or [], 0)

    def _pieces(self, part: Part, *, ended: bool) -> Iterator[Said]:
        """What is said, and calls once they are whole: when something else begins."""
        for event in part.events:
            if not isinstance(event, CallArguments):
                yield from self._calls()
            match event:
                case ContentText(text):
                    yield Said(text)
                case ReasoningText(text):
                    yield Said(thinking=text)
                case CallBegin(index):
                    self._begun = index + 1
        if ended:
            yield from self._calls()

    def _calls(self) -> Iterator[Said]:
        if self.turns is None:
            return
        while self._told < self._begun:
            yield _called(self.turns[0].whole.calls[self._told], self._told)
            self._told += 1

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        return [scored_token(entry, self.texts) for entry in entries]

    def _end(self, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": completion.finish_reason,
            **({} if self.context is None else {"context": self.context}),
            **durations(self.usage.metrics),
            "prompt_eval_count": self.usage.prompt,
            "eval_count": self.usage.generated,
        }


def durations(metrics: RequestMetrics | None) -> dict[str, int]:
    """Nanoseconds of a request that has ended; what it waited for is told as loading."""
    assert metrics is not None and metrics.finished_time is not None
    arrival, finished = metrics.arrival_time, metrics.finished_time
    begun = metrics.first_scheduled_time or arrival
    first = metrics.first_token_time or finished
    seconds = {
        "total_duration": finished - arrival,
        "load_duration": begun - arrival,
        "prompt_eval_duration": first - begun,
        "eval_duration": finished - first,
    }
    return {name: round(value * 1e9) for name, value in seconds.items()}


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": now()}


def _called(call: ToolCall, index: int) -> Said:
    """A call with its arguments as an object; one that was cut off is text."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return Said(call.name + call.arguments)
    function = {"index": index, "name": call.name, "arguments": arguments}
    return Said(calls=[{"id": call.call_id, "function": function}])
