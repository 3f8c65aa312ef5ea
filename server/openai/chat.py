"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.core.conversation import chat_prompt
from slipstream.server.core.http.respond import log_prompts, respond, service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.openai.logprobs import chat_logprobs, prompt_logprobs
from slipstream.server.openai.messages import conversation_of
from slipstream.server.openai.protocol import ChatRequest
from slipstream.server.openai.reply import (
    GENERATED,
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
    params = chat_params(body, service.llm.generation_defaults)
    prompt = await service.llm.render(
        chat_prompt, service.llm.tokenizer, conversation_of(body), body.add_special_tokens
    )
    log_prompts(service, [prompt.text], params)
    return await respond(request, job_of(body, [prompt.token_ids], params), ChatReply(frame))


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
        """A chunk for every completion with something new."""
        self.frame.usage.add(output, position)
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
        if output.prompt_logprobs is None:
            return self.frame.whole(choices)
        scores = prompt_logprobs(output.prompt_logprobs, self.frame.texts)
        return self.frame.whole(choices, prompt_logprobs=scores)

    def _chunks(self, completion: CompletionOutput) -> str:
        index, chunks = completion.index, ""
        if index not in self._begun:
            self._begun.add(index)
            role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            chunks = self.frame.event(f'{{"index":{index},{role}}}')
        logprobs = "null"
        if completion.logprobs:
            logprobs = dump(chat_logprobs(completion.logprobs, self.frame.texts)).decode()
        if completion.finish_reason is not None:
            self._ended.add(index)
        elif not completion.text and logprobs == "null":
            return chunks  # a part of a character, or of what may be a stop string
        delta = f'"delta":{{"content":{json_text(completion.text)}}},"logprobs":{logprobs}'
        return chunks + self.frame.event(f'{{"index":{index},{delta},{last_fields(completion)}')

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
