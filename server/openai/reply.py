"""What the two generating endpoints have in common: usage, and JSON made by hand for streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as json_text
from typing import Any, Protocol

from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.openai.logprobs import TokenTexts
from slipstream.server.openai.protocol import StreamOptions

__all__ = ["Frame", "Reply", "Usage", "dump", "json_text", "last_fields"]


class Reply(Protocol):
    """Turns the outputs of a request into what the client reads."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        ...

    def events(self, position: int, output: RequestOutput) -> bytes:
        """Server-sent events for an output of kind ``delta``, maybe none."""
        ...

    def end(self) -> bytes:
        """The events after the last output."""
        ...

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The JSON of the whole answer, from outputs of kind ``final``."""
        ...


@dataclass(slots=True)
class Usage:
    """Tokens of all prompts and completions of a request."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    _seen: set[int] = field(default_factory=set)

    def add(self, position: int, output: RequestOutput) -> None:
        """Take an output of kind ``delta`` or ``final`` into account."""
        if position not in self._seen:
            self._seen.add(position)
            self.prompt += len(output.prompt_token_ids)
            self.cached += output.num_cached_tokens
        for completion in output.outputs:
            self.generated += len(completion.token_ids)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Frame:
    """The frame of an answer: what all its objects begin and end with."""

    kind: str
    id_prefix: str
    model: str
    texts: TokenTexts
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    usage: Usage = field(default_factory=Usage)
    request_id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _head: str = ""
    _tail: str | None = None  # None: it changes

    def __post_init__(self) -> None:
        self.request_id = self.id_prefix + uuid.uuid4().hex
        named = f'"id":"{self.request_id}","object":"{self.kind}","created":{self.created}'
        self._head = f'data: {{{named},"model":{json_text(self.model)},"choices":['
        if not self.stream_options.include_usage:
            self._tail = "]}\n\n"
        elif not self.stream_options.continuous_usage_stats:
            self._tail = '],"usage":null}\n\n'

    def event(self, choice: str) -> str:
        """An event with one choice, given as JSON, or with none."""
        return self._head + choice + (self._tail or self._usage_tail())

    def end(self) -> str:
        """The events that close a stream."""
        usage = self._head + self._usage_tail() if self.stream_options.include_usage else ""
        return usage + "data: [DONE]\n\n"

    def whole(self, choices: Sequence[Any], **extra: Any) -> bytes:  # noqa: ANN401 - JSON
        """The object that answers a request that is not streamed."""
        answer = {
            "id": self.request_id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage.as_json(),
        }
        return dump({**answer, **extra})

    def _usage_tail(self) -> str:
        return f'],"usage":{json.dumps(self.usage.as_json())}}}\n\n'


def last_fields(completion: CompletionOutput) -> str:
    """How a choice of a stream ends: with its finish reason, once there is one."""
    if completion.finish_reason is None:
        return '"finish_reason":null}'
    stop = json.dumps(completion.stop_reason)
    return f'"finish_reason":"{completion.finish_reason}","stop_reason":{stop}}}'


def dump(value: Any) -> bytes:  # noqa: ANN401 - JSON
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
