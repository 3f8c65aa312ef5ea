"""Sampling parameters of OpenAI's requests."""

from __future__ import annotations

from typing import Any

from slipstream.errors import InvalidRequestError
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
    n, logprobs = request.best_of or request.n, request.logprobs
    _check_listed(request, scored=logprobs is not None and not only_scores(request))
    if picks_best(request):
        logprobs = logprobs or 0
    return _params(
        request,
        defaults,
        n=n or defaults.n,
        max_tokens=max_tokens,
        logprobs=logprobs,
        structured=form_of(request, tokenizer),
        prompt_logprobs=prompt_logprobs,
    )


def picks_best(request: CompletionRequest) -> bool:
    """Whether more is generated than is told; raises ``InvalidRequestError``."""
    best_of, n = request.best_of, request.n or 1
    if best_of is None or best_of == n:
        return False
    if best_of < n:
        raise InvalidRequestError(
            f"best_of={best_of} is less than n={n}; raise best_of, or lower n", param="best_of"
        )
    if request.stream:
        raise InvalidRequestError(
            "best_of does not go with a stream: which completions are the best is known at the "
            "end; leave out one of the two",
            param="best_of",
        )
    return True


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
    _check_listed(request, scored=bool(request.logprobs))
    return _params(
        request,
        defaults,
        max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
        logprobs=logprobs,
        structured=form_of(request, tokenizer),
        prediction="" if request.prediction is None else request.prediction.text,
    )


def _check_listed(request: GenerationRequest, *, scored: bool) -> None:
    if request.logprob_token_ids is not None and not scored:
        raise InvalidRequestError(
            "logprob_token_ids needs logprobs, and tokens that are generated",
            param="logprob_token_ids",
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
