"""What the two generating endpoints have in common: checks, and JSON made by hand for streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as json_text
from typing import Any, Self

from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.request import OutputKind
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.dump import dump
from slipstream.server.core.http.error_object import error_body
from slipstream.server.core.job import Job
from slipstream.server.core.logprobs import TokenIds, TokenTexts
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.service import Service
from slipstream.server.core.usage import Usage
from slipstream.server.openai.protocol import GenerationRequest, StreamOptions

__all__ = [
    "GENERATED",
    "GOES_ON",
    "Frame",
    "check_stream",
    "job_of",
    "json_text",
    "last_fields",
]

GENERATED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: one object, or with `stream` events that end with `[DONE]`.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}

GOES_ON = '"finish_reason":null}'  # how a choice of a stream ends that is not the last


def check_stream(request: GenerationRequest, instead: str = "leave out stream") -> None:
    """Raise ``Refusal`` for fields that do not go with a stream, or without one."""
    if request.stream and request.prompt_logprobs is not None:
        raise Refusal(
            "invalid",
            f"prompt_logprobs is not told in streams; {instead}",
            param="prompt_logprobs",
        )
    if request.stream_options is not None and not request.stream:
        raise Refusal("invalid", "stream_options needs stream to be true", param="stream_options")


def job_of(
    request: GenerationRequest,
    prompts: Sequence[Prompt | Conversation],
    params: SamplingParams,
    fields: Mapping[str, str] | None = None,
) -> Job:
    """What a request asks of the engine; ``fields`` are those of ``Job``. Raises ``Refusal``."""
    if request.truncate_prompt_tokens == 0:
        raise Refusal(
            "invalid",
            "truncate_prompt_tokens is 0, and nothing is left of the prompt; use at least 1, or -1 "
            "for as many as fit",
            param="truncate_prompt_tokens",
        )
    kind: OutputKind = "delta" if request.stream else "final"
    return Job(
        prompts,
        params,
        kind,
        request.priority or 0,
        request.add_special_tokens,
        fields or {},
        last_tokens=request.truncate_prompt_tokens,
        cache_salt=request.cache_salt or "",
    )


@dataclass(slots=True)
class Frame:
    """The frame of an answer: what all its objects begin and end with."""

    kind: str
    id_prefix: str
    model: str
    fingerprint: str
    texts: TokenTexts
    names: TokenTexts  # the same, or as the client wants tokens called
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    usage: Usage = field(default_factory=Usage)
    request_id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _head: str = ""
    _tail: str | None = None  # None: it changes

    @classmethod
    def of(cls, service: Service, request: GenerationRequest, kind: str, id_prefix: str) -> Self:
        """The frame of the answer to a request; raises ``Refusal`` for an unknown model."""
        options = request.stream_options or StreamOptions()
        model = service.model(request.model)
        texts = names = service.texts
        if request.return_tokens_as_token_ids:
            names = TokenIds(service.llm.tokenizer)
        frame = cls(kind, id_prefix, model, service.llm.fingerprint, texts, names, options)
        frame.named(request.request_id or uuid.uuid4().hex)
        return frame

    def named(self, name: str) -> None:
        """Call the answer by a name."""
        self.request_id = self.id_prefix + name
        named = f'"id":{json_text(self.request_id)},"object":"{self.kind}","created":{self.created}'
        server = f'"model":{json_text(self.model)},"system_fingerprint":"{self.fingerprint}"'
        self._head = f'data: {{{named},{server},"choices":['
        if not self.stream_options.include_usage:
            self._tail = "}\n\n"
        elif not self.stream_options.continuous_usage_stats:
            self._tail = ',"usage":null}\n\n'

    @property
    def is_fixed(self) -> bool:
        """Whether all events have the same around their choice."""
        return self._tail is not None

    def event(self, choice: str, more: str = "") -> str:
        """An event with one choice, given as JSON, or with none, and ``more`` fields after it."""
        return self._head + choice + "]" + more + (self._tail or self._usage_tail())

    def end(self) -> bytes:
        """The events that close a stream."""
        usage = self._head + "]" + self._usage_tail() if self.stream_options.include_usage else ""
        return f"{usage}data: [DONE]\n\n".encode()

    def error(self, refusal: Refusal) -> bytes:
        """The event that closes a stream which failed."""
        return b"data: " + error_body(refusal) + b"\n\n"

    def whole(self, choices: Sequence[Any], **extra: Any) -> bytes:  # noqa: ANN401 - JSON
        """The object that answers a request that is not streamed."""
        answer = {
            "id": self.request_id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "usage": _usage_json(self.usage),
            **extra,
        }
        listed = b",".join(map(dump, choices))
        return b'{"choices":[' + listed + b"]," + dump(answer).removeprefix(b"{")

    def _usage_tail(self) -> str:
        return f',"usage":{json.dumps(_usage_json(self.usage))}}}\n\n'


def _usage_json(usage: Usage) -> dict[str, Any]:
    tokens = usage.tokens()
    cached = tokens.pop("cached_tokens")
    return {
        **tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.rejected,
        },
    }


def last_fields(finish_reason: str | None, stop_reason: int | str | None) -> str:
    """How a choice of a stream ends: with its finish reason, once there is one."""
    if finish_reason is None:
        return GOES_ON
    return f'"finish_reason":"{finish_reason}","stop_reason":{json.dumps(stop_reason)}}}'
