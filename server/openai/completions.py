"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.openai.logprobs import completion_logprobs, prompt_logprobs
from slipstream.server.openai.protocol import CompletionRequest
from slipstream.server.openai.reply import (
    GENERATED,
    Frame,
    check_stream,
    dump,
    job_of,
    json_text,
    last_fields,
)
from slipstream.server.openai.sampling import completion_params, only_scores

router = APIRouter()


@router.post("/v1/completions", responses=GENERATED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    service = service_of(request)
    frame = Frame.of(service, body, "text_completion", "cmpl-")
    check_stream(body, "leave out stream, or use echo and logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise Refusal("invalid", "max_tokens 0 needs echo; use at least 1", param="max_tokens")
    params = completion_params(body, service.llm.generation_defaults)
    reply = CompletionReply(body, frame, service.llm.tokenizer, params.n)
    return await respond(request, job_of(body, as_prompts(body.prompt), params), reply)


def as_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """The prompts of a request that may hold one or several, as text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return list(cast(list[Prompt], prompt))


@dataclass(slots=True)
class CompletionReply:
    """The answer to ``/v1/completions``; choices are numbered prompt by prompt."""

    request: CompletionRequest
    frame: Frame
    tokenizer: Tokenizer
    n: int
    _offsets: dict[int, int] = field(default_factory=dict)  # characters sent, by choice
    _ended: set[int] = field(default_factory=set)
    _only_scores: bool = False

    def __post_init__(self) -> None:
        self._only_scores = only_scores(self.request)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.frame.usage

    def events(self, position: int, output: RequestOutput) -> bytes:
        """A chunk for every completion with something new."""
        self._note(position, output)
        return "".join(
            self._chunk(position, output, completion) for completion in output.outputs
        ).encode()

    def end(self) -> bytes:
        """The events after the last."""
        return self.frame.end()

    def error(self, refusal: Refusal) -> bytes:
        """The event in their place."""
        return self.frame.error(refusal)

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The ``text_completion`` object."""
        choices = []
        for position, output in enumerate(outputs):
            self._note(position, output)
            choices += [self._choice(position, output, c) for c in output.outputs]
        return self.frame.whole(choices)

    def _note(self, position: int, output: RequestOutput) -> None:
        if self._only_scores:
            for completion in output.outputs:
                _drop_tokens(completion)
        self.frame.usage.add(output, position)

    def _chunk(self, position: int, output: RequestOutput, completion: CompletionOutput) -> str:
        index = position * self.n + completion.index
        text, scores = completion.text, "null"
        begun = index in self._offsets
        if completion.finish_reason is not None:
            if index in self._ended:
                return ""
            self._ended.add(index)
        elif begun and not text and not completion.logprobs:
            return ""  # a part of a character, or of what may be a stop string
        if not begun or self.request.logprobs is not None:
            text, scores = self._begin(index, output, completion)
        fields = f'{{"index":{index},"text":{json_text(text)},"logprobs":{scores},'
        return self.frame.event(fields + last_fields(completion))

    def _begin(
        self, index: int, output: RequestOutput, completion: CompletionOutput
    ) -> tuple[str, str]:
        """Text and ``logprobs`` of a chunk that is the first of a choice, or has scores."""
        text, scores, offset = completion.text, "null", self._offsets.get(index)
        if self.request.logprobs is not None:
            found = self._logprobs(output, completion, echo=offset is None, offset=offset or 0)
            scores = dump(found).decode()
        if offset is None and self.request.echo:
            text = self._prompt_text(output) + text
        self._offsets[index] = (offset or 0) + len(text)
        return text, scores

    def _choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        text = completion.text
        if self.request.echo:
            text = self._prompt_text(output) + text
        choice: dict[str, Any] = {
            "index": position * self.n + completion.index,
            "text": text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.request.logprobs is not None:
            choice["logprobs"] = self._logprobs(output, completion, echo=True, offset=0)
        if self.request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self.frame.texts)
        return choice

    def _logprobs(
        self, output: RequestOutput, completion: CompletionOutput, *, echo: bool, offset: int
    ) -> dict[str, Any]:
        token_ids = completion.token_ids
        entries: list[TokenLogprobs | None] = [*(completion.logprobs or ())]
        if echo and self.request.echo and output.prompt_logprobs is not None:
            token_ids = output.prompt_token_ids + token_ids
            entries = [*output.prompt_logprobs, *entries]
        return completion_logprobs(token_ids, entries, self.frame.texts, offset)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _drop_tokens(completion: CompletionOutput) -> None:
    completion.text, completion.token_ids, completion.logprobs = "", [], []
    completion.finish_reason, completion.stop_reason = "length", None
