"""What the engine loop remembers of a request to tell its caller."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from slipstream.builder.contract import Pooling
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.engine.sequence import Sequence, child_seed
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.pooling import Pool
from slipstream.runtime.request import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
)
from slipstream.runtime.text.detokenizer import Detokenizer
from slipstream.runtime.text.tokenizer import Tokenizer

# Of a request that hears nothing before its end, the text is made while the device computes: many
# that end together would have it wait.
_DECODED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sequence ended, with its last token or without one, and how many tokens of a prediction
    were right and wrong."""

    reason: FinishReason
    stop_reason: int | str | None
    in_stop_token: bool
    num_accepted: int = 0
    num_rejected: int = 0

    def of(self, sequence: Sequence) -> None:
        """Make it that of a sequence."""
        sequence.finish_reason, sequence.stop_reason = self.reason, self.stop_reason
        sequence.ends_in_stop_token = self.in_stop_token
        sequence.num_accepted, sequence.num_rejected = self.num_accepted, self.num_rejected


@dataclass(slots=True, eq=False)
class CompletionState:
    """Text and log probabilities of one sequence, and how much of them was told.

    Without a ``detokenizer`` there is no text, and no stop string is looked for: that is done where
    the tokens are told.
    """

    sequence: Sequence
    detokenizer: Detokenizer | None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float = 0.0
    told_end: bool = False  # to whoever makes text of the tokens
    _pieces: list[str] = field(default_factory=list)  # that were not told yet, or all text
    _closed: bool = False
    _decoded: int = 0
    _told_tokens: int = 0

    @classmethod
    def of(cls, sequence: Sequence, tokenizer: Tokenizer | None) -> CompletionState:
        """That of a sequence without output; text is made with ``tokenizer``, if any."""
        params, prompt = sequence.request.params, sequence.request.prompt_token_ids
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer, params, prompt)
        return cls(sequence, detokenizer, None if params.logprobs is None else [])

    def take(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Append a sampled token; a stop string ends the sequence at once. Raises what
        ``Sequence.append`` raises, and ``ExecutionError`` of the tokenizer."""
        sequence = self.sequence
        sequence.append(token)
        if logprobs is not None:
            self._score((logprobs,))
        if sequence.request.params.stop:
            self._find_stop()

    def follow(
        self, tokens: list[int], logprobs: Sequence_[TokenLogprobs], ending: Ending | None
    ) -> None:
        """Append the tokens of a sequence that runs elsewhere, where it may have ended in the way
        of ``ending``; a stop string ends it before that. Raises ``ExecutionError`` of the
        tokenizer."""
        sequence = self.sequence
        if not sequence.request.params.stop:
            sequence.output += tokens
            self._score(logprobs)
            tokens = []
        for index, token in enumerate(tokens):
            sequence.output.append(token)
            self._score(logprobs[index : index + 1])
            if ending is not None and index == len(tokens) - 1:
                ending.of(sequence)
            self._find_stop()
            if sequence.finish_reason:
                return
        if ending is not None:
            ending.of(sequence)

    def news(self) -> tuple[list[int], list[TokenLogprobs]]:
        """The tokens that are new since the last call or output, and their log probabilities."""
        start, self._told_tokens = self._told_tokens, len(self.sequence.output)
        return self.sequence.output[start:], [] if self.logprobs is None else self.logprobs[start:]

    def _score(self, logprobs: Sequence_[TokenLogprobs]) -> None:
        if self.logprobs is not None:
            for each in logprobs:
                self.logprobs.append(each)
                self.cumulative_logprob += each.logprob

    def jump(self) -> None:
        """Append the tokens that the form forces next, up to one that ends the sequence; raises as
        ``take`` does."""
        sequence = self.sequence
        if sequence.constraint is None or sequence.finish_reason:
            return
        for token in sequence.constraint.forced():
            sequence.force(token)
            self._find_stop()
            if sequence.finish_reason:
                return

    def _find_stop(self) -> None:
        sequence = self.sequence
        if self.detokenizer is not None and sequence.request.params.stop:
            self.decode()
            if self.detokenizer.stopped:
                sequence.finish_reason = "stop"
                sequence.stop_reason = self.detokenizer.stop_reason

    def decode(self) -> None:
        """Turn the tokens that came since the last call into text."""
        sequence = self.sequence
        if self.detokenizer is None:
            return
        end = len(sequence.output)
        if sequence.ends_in_stop_token:  # which is not part of the text
            end -= not sequence.request.params.include_stop_str_in_output
        if end > self._decoded:
            self._pieces.append(self.detokenizer.append(sequence.output[self._decoded : end]))
            self._decoded = end
        if sequence.finish_reason and not self._closed:
            self._pieces.append(self.detokenizer.finish())
            self._closed = True

    def silence(self) -> None:
        """Decode no more: the text ends where it is."""
        self._decoded, self._closed = sys.maxsize, True

    def output(self, delta: bool) -> CompletionOutput:
        """Everything so far, or what is new since the last call."""
        sequence = self.sequence
        start = self._told_tokens if delta else 0
        text = "".join(self._pieces)
        self._pieces = [] if delta else [text]
        self._told_tokens = len(sequence.output)
        return CompletionOutput(  # by place, here and below: by name it takes twice as long
            sequence.index,
            text,
            sequence.output[start:],
            None if self.logprobs is None else self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[start:],
            sequence.finish_reason,
            sequence.stop_reason,
        )


@dataclass(slots=True, eq=False)
class RequestState:
    """A request, its completions, and its times."""

    request: Request
    completions: list[CompletionState]
    metrics: RequestMetrics
    error: SlipstreamError | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        for completion in self.completions:  # noqa: SIM110 - every step asks, and all() is slower
            if completion.sequence.finish_reason is None:
                return False
        return True

    @property
    def _is_long(self) -> bool:
        """Whether a completion has enough tokens without text."""
        for completion in self.completions:
            if len(completion.sequence.output) - completion._decoded >= _DECODED_AT_ONCE:
                return True
        return False

    def fail(self, error: SlipstreamError) -> None:
        """Note why the request is to end although its step did not fail."""
        self.error = error
        for completion in self.completions:
            completion.silence()

    def output(self) -> RequestOutput | None:
        """What the caller is to hear now, if anything; decodes what is new."""
        kind = self.request.output_kind
        waits = kind == "final" and not self.finished and self.error is None
        if waits and not self._is_long:
            return None
        try:
            for completion in self.completions:
                completion.decode()
        except ExecutionError as error:  # of the tokenizer
            self.fail(error)
        if waits and self.error is None:
            return None
        request, leader = self.request, self.completions[0].sequence
        output = RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [completion.output(kind == "delta") for completion in self.completions],
            self.finished or self.error is not None,
            self.metrics,
            None if leader.scores_prompt else leader.prompt_logprobs,
            leader.num_cached or 0,
            None if leader.pool is None else leader.pool.value,
            self.error,
        )
        if request.params.prediction_token_ids:
            sequences = [completion.sequence for completion in self.completions]
            output.accepted_prediction_tokens = sum(each.num_accepted for each in sequences)
            output.rejected_prediction_tokens = sum(each.num_rejected for each in sequences)
        return output


def sequences_of(
    request: Request,
    arrival: int,
    max_tokens: int,
    seed: int,
    eos_token_ids: frozenset[int] = frozenset(),
    *,
    jumps: bool = False,
    pooling: Pooling | None = None,
) -> list[Sequence]:
    """The ``n`` sequences of a request, of which the first releases the others; the last arguments
    are those of ``Sequence``, and how the engine pools, if it does."""
    sequences = [
        Sequence(
            request=request,
            index=index,
            order=(request.priority, arrival, index),
            max_tokens=max_tokens,
            seed=child_seed(seed, index),
            eos_token_ids=eos_token_ids,
            jumps=jumps,
        )
        for index in range(request.params.n)
    ]
    sequences[0].followers = sequences[1:]
    if request.params.prompt_logprobs is not None:
        sequences[0].prompt_logprobs = [None]
    if request.pooling is not None:
        assert pooling is not None, "only an engine that pools is asked to"
        sequences[0].pool = Pool(pooling, request.pooling, len(request.prompt_token_ids))
    return sequences
