"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.offsets import TextOffsets
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.dump import dump
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.openai.forms import form_field
from slipstream.server.openai.logprobs import prompt_logprobs
from slipstream.server.openai.protocol import CompletionRequest
from slipstream.server.openai.reply import (
    GENERATED,
    GOES_ON,
    Frame,
    check_stream,
    job_of,
    json_text,
    last_fields,
)
from slipstream.server.openai.sampling import completion_params, only_scores
from slipstream.server.openai.scored_tokens import ScoredTokens

router = APIRouter()


@router.post("/v1/completions", responses=GENERATED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    service = service_of(request)
    frame = Frame.of(service, body, "text_completion", "cmpl-")
    check_stream(body, "leave out stream, or use echo and logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise Refusal("invalid", "max_tokens 0 needs echo; use at least 1", param="max_tokens")
    tokenizer = service.llm.tokenizer
    params = completion_params(body, service.defaults, tokenizer)
    reply = CompletionReply(body, frame, tokenizer, params)
    fields = {"structured": form_field(body) or "structured"}
    if body.best_of is not None:
        fields["n"] = "best_of"
    if body.prompt_logprobs is None:  # of echo
        fields["prompt_logprobs"] = "logprobs"
    return await respond(request, job_of(body, _prompts(body, tokenizer), params, fields), reply)


def _prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a request that may hold one or several, as text or token ids, or null for the
    beginning of a document."""
    prompt = request.prompt
    if prompt is None:
        return [_document_start(tokenizer)]
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return list(cast(list[Prompt], prompt))


def _document_start(tokenizer: Tokenizer) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise Refusal(
        "invalid",
        "prompt is null, and this model has no token that begins a text; give a prompt",
        param="prompt",
    )


@dataclass(slots=True)
class _Choice:
    """One choice on its way: what of it has been told."""

    scores: ScoredTokens | None
    prompt: str = ""  # to echo before anything else
    prompt_token_ids: list[int] | None = None  # to tell with the first tokens; None: told, or none
    token_ids: list[int] | None = None  # that were not told yet; None: they are not wanted
    ended: bool = False

    def take(self, completion: CompletionOutput) -> str:
        """The new text."""
        text, self.prompt = self.prompt + completion.text, ""
        if self.scores is not None:
            self.scores.add(completion.token_ids, completion.logprobs or ())
        if self.token_ids is not None:
            self.token_ids += completion.token_ids
        self.ended = completion.finish_reason is not None
        return text

    def ids(self) -> dict[str, list[int]]:
        """The fields for tokens that were not told yet."""
        if self.token_ids is None:
            return {}
        told = {"token_ids": self.token_ids}
        if self.prompt_token_ids is not None:
            told["prompt_token_ids"] = self.prompt_token_ids
        self.prompt_token_ids, self.token_ids = None, []
        return told


@dataclass(slots=True)
class CompletionReply:
    """The answer to ``/v1/completions``; choices are numbered prompt by prompt."""

    request: CompletionRequest
    frame: Frame
    tokenizer: Tokenizer
    params: SamplingParams
    _choices: dict[int, _Choice] = field(default_factory=dict)
    # What stands around the text of choices that have nothing else to tell until they end.
    _around: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.frame.usage

    def events(self, position: int, output: RequestOutput) -> bytes:
        """A chunk for every completion with something new."""
        self.usage.add_prompt(output, position)
        first, *others = output.outputs
        around = self._around.get(self._index(position, first))
        if around is not None and first.finish_reason is None and not others:
            self.usage.generated += len(first.token_ids)
            return f"{around[0]}{json_text(first.text)}{around[1]}".encode() if first.text else b""
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
            self.usage.add_prompt(output, position)
            choices += [self._whole(position, output, c) for c in self._best(output)]
        return self.frame.whole(choices)

    def _best(self, output: RequestOutput) -> list[CompletionOutput]:
        """The likeliest of more completions than were asked for, in that order."""
        told = self.request.n or 1
        if told == len(output.outputs):
            return output.outputs
        ranked = sorted(output.outputs, key=_likelihood, reverse=True)
        for index, completion in enumerate(ranked):
            completion.index = index
        self.usage.generated += sum(len(c.token_ids) for c in ranked[told:])
        return ranked[:told]

    def _chunk(self, position: int, output: RequestOutput, completion: CompletionOutput) -> str:
        if not completion.token_ids and completion.finish_reason is None:
            return ""  # it has not begun, or this is another's turn
        choice = self._choice(position, output, completion)
        if choice.ended:
            return ""
        text, scores = choice.take(completion), None
        if choice.scores is not None:
            scores = choice.scores.tell(text, last=choice.ended)
        if not (text or scores or choice.ended):
            return ""  # a part of a character, or of what may be a stop string
        logprobs = "null" if scores is None else dump(scores).decode()
        index = self._index(position, completion)
        if choice.scores is None and choice.token_ids is None and self.frame.is_fixed:
            event = self.frame.event(f'{{"index":{index},"text":\0,"logprobs":null,{GOES_ON}')
            before, _, after = event.partition("\0")
            self._around[index] = before, after
        fields = f'{{"index":{index},"text":{json_text(text)},"logprobs":{logprobs},'
        if ids := choice.ids():
            fields += dump(ids).decode()[1:-1] + ","
        return self.frame.event(
            fields + last_fields(completion.finish_reason, completion.stop_reason)
        )

    def _whole(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        choice = self._choice(position, output, completion)
        text = choice.take(completion)
        scores = None
        if self.request.prompt_logprobs is not None:
            scores = prompt_logprobs(output.prompt_logprobs, self.frame.texts)
        return {
            "index": self._index(position, completion),
            "text": text,
            "logprobs": choice.scores and choice.scores.tell(text, last=True),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "prompt_logprobs": scores,
            **choice.ids(),
        }

    def _choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> _Choice:
        """The choice of a completion, which has been counted."""
        if only_scores(self.request):
            _drop_tokens(completion)
        self.usage.generated += len(completion.token_ids)
        index = self._index(position, completion)
        if index not in self._choices:
            self._choices[index] = self._begun(output)
        return self._choices[index]

    def _begun(self, output: RequestOutput) -> _Choice:
        prompt = self._prompt_text(output) if self.request.echo else ""
        wanted = bool(self.request.return_token_ids)
        scores = None if self.request.logprobs is None else self._scores(output, prompt)
        return _Choice(scores, prompt, output.prompt_token_ids, [] if wanted else None)

    def _scores(self, output: RequestOutput, prompt: str) -> ScoredTokens:
        stream = self.tokenizer.text_stream(
            skip_special_tokens=self.params.skip_special_tokens, prompt=output.prompt_token_ids
        )
        scores = ScoredTokens(self.frame.names, TextOffsets(stream, len(prompt)))
        if self.request.echo:
            entries = output.prompt_logprobs or ()
            scores.add_at(self._prompt_offsets(output), output.prompt_token_ids, entries)
        return scores

    def _index(self, position: int, completion: CompletionOutput) -> int:
        return position * (self.request.n or 1) + completion.index

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def _prompt_offsets(self, output: RequestOutput) -> list[int]:
        if output.prompt is not None:
            return self.tokenizer.offsets(output.prompt)
        offsets = TextOffsets(self.tokenizer.text_stream(skip_special_tokens=False), 0)
        return [offsets.take(token) for token in output.prompt_token_ids]


def _likelihood(completion: CompletionOutput) -> float:
    return completion.cumulative_logprob or 0.0


def _drop_tokens(completion: CompletionOutput) -> None:
    completion.text, completion.token_ids, completion.logprobs = "", [], []
    completion.finish_reason, completion.stop_reason = "length", None
