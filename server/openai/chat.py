"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.openai.logprobs import chat_logprobs, prompt_logprobs
from slipstream.server.openai.messages import conversation_of
from slipstream.server.openai.protocol import ChatRequest
from slipstream.server.openai.reply import (
    GENERATED,
    GOES_ON,
    Frame,
    check_stream,
    dump,
    job_of,
    json_text,
    last_fields,
)
from slipstream.server.openai.sampling import chat_params

router = APIRouter()


@router.post("/v1/chat/completions", responses=GENERATED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    frame = Frame.of(service, body, kind, "chatcmpl-")
    if body.top_logprobs and not body.logprobs:
        raise Refusal("invalid", "top_logprobs needs logprobs to be true", param="top_logprobs")
    check_stream(body)
    params = chat_params(body, service.defaults)
    fields = {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = "max_completion_tokens"
    job = job_of(body, [conversation_of(body)], params, fields)
    return await respond(request, job, ChatReply(frame))


@dataclass(slots=True)
class ChatReply:
    """The answer to a chat."""

    frame: Frame
    _begun: set[int] = field(default_factory=set)
    _ended: set[int] = field(default_factory=set)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.frame.usage

    def events(self, position: int, output: RequestOutput) -> bytes:
        """Chunks for every completion with something new."""
        self.frame.usage.add_prompt(output, position)
        events = "".join(self._chunks(c) for c in output.outputs if c.index not in self._ended)
        return events.encode()

    def end(self) -> bytes:
        """The events after the last."""
        return self.frame.end()

    def error(self, refusal: Refusal) -> bytes:
        """The event in their place."""
        return self.frame.error(refusal)

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The ``chat.completion`` object."""
        (output,) = outputs
        self.frame.usage.add(output)
        choices = [self._choice(completion) for completion in output.outputs]
        scores = prompt_logprobs(output.prompt_logprobs, self.frame.texts)
        return self.frame.whole(choices, prompt_logprobs=scores)

    def _chunks(self, completion: CompletionOutput) -> str:
        """The role, content and the end are chunks of their own, each with the usage before it."""
        index, chunks = completion.index, ""
        if not completion.token_ids and completion.finish_reason is None:
            return chunks  # it has not begun
        if index not in self._begun:
            self._begun.add(index)
            chunks += self._chunk(index, '{"role":"assistant","content":""}')
        logprobs = "null"
        if completion.logprobs:
            logprobs = dump(chat_logprobs(completion.logprobs, self.frame.texts)).decode()
        # Without either it is a part of a character, or of what may be a stop string.
        if completion.text or completion.logprobs:
            delta = f'{{"content":{json_text(completion.text)}}}'
            chunks += self._chunk(index, delta, logprobs)
        self.frame.usage.generated += len(completion.token_ids)
        if completion.finish_reason is not None:
            self._ended.add(index)
            chunks += self._chunk(index, "{}", end=last_fields(completion))
        return chunks

    def _chunk(self, index: int, delta: str, logprobs: str = "null", end: str = GOES_ON) -> str:
        return self.frame.event(f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},{end}')

    def _choice(self, completion: CompletionOutput) -> dict[str, object]:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = chat_logprobs(completion.logprobs, self.frame.texts)
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
