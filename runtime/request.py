"""What a caller asks for, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from slipstream.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from slipstream.errors import SlipstreamError
    from slipstream.runtime.chat.events import AssistantTurn
    from slipstream.runtime.engine.handover import Handover
    from slipstream.runtime.engine.step import TokenLogprobs
    from slipstream.runtime.pooling import PoolingParams
    from slipstream.runtime.sampling.params import SamplingParams
    from slipstream.runtime.structured.grammar import Grammar

FinishReason = Literal["stop", "length", "abort", "error"]
OutputKind = Literal["cumulative", "delta", "final"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.

    A lower ``priority`` runs sooner; equal ones run first come, first served. ``output_kind``
    chooses what each ``RequestOutput`` holds: everything so far, what is new, or (``final``) only
    one output at the end. Only requests with equal ``cache_namespace`` share computed prompts. A
    prompt with ``pooling`` is pooled, not continued. ``grammar`` is what ``params.structured`` was
    compiled to. A ``handover`` brings pages of the prompt from another engine, or there; only where
    ``n`` is 1.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    output_kind: OutputKind = "cumulative"
    cache_namespace: str = ""
    pooling: PoolingParams | None = None
    grammar: Grammar | None = None
    handover: Handover | None = None


def check_tokens(tokens: list[int], vocab_size: int) -> None:
    """Raise ``InvalidRequestError`` for a prompt, of a token or more, that no model with so many
    tokens can read."""
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InvalidRequestError(
            f"prompt token ids range from {min(tokens)} to {max(tokens)}; the vocabulary has"
            f" 0 to {vocab_size - 1}. Was the prompt encoded with another tokenizer?",
            param="prompt",
        )


def id_in_use(request_id: str) -> InvalidRequestError:
    """What to raise for a request whose id another one has."""
    return InvalidRequestError(
        f"request id {request_id!r:.80} is in use; give every request its own"
    )


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine loop's clock; None: not yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` continuations.

    ``stop_reason`` is the stop string or stop token id that ended it, None for end-of-sequence and
    for other endings. ``logprobs`` has one entry a token when logprobs were asked for, and
    ``cumulative_logprob`` is the sum over all tokens so far. ``turn`` is what an answer in a
    conversation is made of so far, thoughts and calls apart.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    turn: AssistantTurn | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request after a step.

    ``prompt_logprobs`` has one entry a prompt token, None for the first. ``num_cached_tokens`` is
    how many prompt tokens came from the prefix cache. ``pooled`` is the vector, or the one score,
    of a prompt that was pooled. Of ``params.prediction``, so many tokens were verified so far and
    ``accepted``, or ``rejected``. ``error`` is set when ``finish_reason`` is
    ``"error"``; the Python front ends raise it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    pooled: NDArray[np.float32] | None = None
    error: SlipstreamError | None = field(default=None, repr=False)
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
