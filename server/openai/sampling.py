"""Sampling parameters of OpenAI's requests."""

from __future__ import annotations

from typing import Any

from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.refusal import naming
from slipstream.server.core.sampling import DEFAULT_COMPLETION_TOKENS, FIELDS, sampling_params
from slipstream.server.openai.forms import form_field, form_of
from slipstream.server.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest


def completion_params(
    request: CompletionRequest, defaults: SamplingParams, tokenizer: Tokenizer
) -> SamplingParams:
    """Raises ``InvalidRequestError``; with ``echo``, ``max_tokens`` 0 only scores the prompt."""
    max_tokens, prompt_logprobs = request.max_tokens, request.prompt_logprobs
    if max_tokens is None:
        max_tokens = defaults.max_tokens or DEFAULT_COMPLETION_TOKENS
    elif only_scores(request):
        max_tokens = 1
    if request.echo and prompt_logprobs is None:
        prompt_logprobs = request.logprobs
    return _params(
        request,
        defaults,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        structured=form_of(request, tokenizer),
        prompt_logprobs=prompt_logprobs,
    )


def only_scores(request: CompletionRequest) -> bool:
    """Whether nothing is to be generated; a step samples one token nevertheless."""
    return bool(request.echo) and request.max_tokens == 0


def chat_params(
    request: ChatRequest, defaults: SamplingParams, tokenizer: Tokenizer
) -> SamplingParams:
    """Raises ``InvalidRequestError``."""
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(
        request,
        defaults,
        max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
        logprobs=logprobs,
        structured=form_of(request, tokenizer),
    )


def _params(
    request: GenerationRequest,
    defaults: SamplingParams,
    **decided: Any,  # noqa: ANN401 - fields have many types
) -> SamplingParams:
    given = {name: getattr(request, name, None) for name in FIELDS - decided.keys()}
    given = {name: value for name, value in given.items() if value is not None}
    with naming({"structured": form_field(request) or "structured"}):
        return sampling_params(defaults, given | decided)
