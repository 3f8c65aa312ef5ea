"""The state of one continuation while it waits and runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.runtime.engine.kv_cache import Allocation
    from slipstream.runtime.engine.step import SamplingRow, TokenLogprobs
    from slipstream.runtime.pooling import Pool
    from slipstream.runtime.request import FinishReason, Request
    from slipstream.runtime.speculation.tracked import Tracked
    from slipstream.runtime.structured.grammar import Constraint

_2_64 = 2**64


def child_seed(seed: int, index: int) -> int:
    """The seed, of 64 bits, of the continuation ``index`` of a request with ``seed``.

    The first has the request's own. The others are mixed (SplitMix64, Steele et al., 2014), so that
    they are nobody's first: requests with neighbouring seeds share no continuation.
    """
    if index == 0:
        return seed % _2_64
    mixed = (seed + index * 0x9E3779B97F4A7C15) % _2_64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % _2_64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % _2_64
    return mixed ^ mixed >> 31


class Status(Enum):
    """Where a sequence is; a preempted one waits again."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one continuation, how many are in the KV cache, and why it ended.

    ``tokens`` are those the host knows. ``pending`` counts what comes after them: tokens that a
    step on its way samples, 0 or 1, and 2 while the loop has two steps on their way. A step may
    sample more, up to as many as it was given drafts: ``num_drafted`` counts those on their way.
    The first ``num_scheduled`` tokens are computed or on their way, the first ``num_computed`` have
    landed; ``num_prefill`` were known when it began to run.

    ``order`` is (priority, arrival, index): the smaller runs first and is preempted last.
    ``max_tokens`` is already clamped to the room that is left; ``max_len`` counts the prompt too.
    ``row`` is its row in the page table while it runs; those of one ``group`` began behind the same
    page of others, -1: none. ``followers`` are its siblings (``n`` > 1),
    which start once its prompt is computed; it is their ``leader`` until they do.
    ``prompt_logprobs`` collects the scores of the prompt if they are wanted, ``pool`` its states if
    it is pooled; no token follows it then. ``sampling_rows`` are
    made by the step builder, one for each token of a run, and used for every step.

    ``constraint`` is where it is in the form that its request asks for; tokens which that forces
    are computed without being sampled first, where it ``jumps``. ``ends_in_stop_token`` tells
    whether the last token is none of the text. ``speculation`` is what is known of its drafts; of
    those from its request's prediction, ``num_accepted`` were right and ``num_rejected`` wrong.
    """

    request: Request
    index: int
    order: tuple[int, int, int]
    max_tokens: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    followers: list[Sequence] = field(default_factory=list)
    leader: Sequence | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pool: Pool | None = None
    tokens: list[int] = field(init=False)
    output: list[int] = field(init=False, default_factory=list)
    prompt_len: int = field(init=False)
    max_len: int = field(init=False)
    pending: int = 0
    num_drafted: int = 0
    num_scheduled: int = 0
    num_computed: int = 0
    num_prefill: int = 0
    num_cached: int | None = None
    allocation: Allocation | None = None
    row: int = -1
    group: int = -1
    sampling_rows: list[SamplingRow] = field(default_factory=list)
    status: Status = Status.WAITING
    jumps: bool = False
    constraint: Constraint | None = None
    speculation: Tracked | None = None
    num_accepted: int = 0
    num_rejected: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    ends_in_stop_token: bool = False
    stop_token_ids: frozenset[int] = field(init=False, repr=False)
    is_simple: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        params = self.request.params
        self.tokens = list(self.request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.max_len = self.prompt_len + self.max_tokens
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        self.stop_token_ids = eos | frozenset(params.stop_token_ids)
        self.is_simple = not (params.needs_output or params.prediction_token_ids)

    @property
    def goes_alone(self) -> bool:
        """Whether a device that keeps what it samples needs no host between two of its tokens,
        however many a step ends in: nothing that a row asks for depends on its place, or on tokens
        before it."""
        params = self.request.params
        return self.is_simple and len(self.output) >= params.min_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that the sequence has at least, whether or not the host knows them yet."""
        return len(self.tokens) + self.pending

    @property
    def num_left(self) -> int:
        """Tokens that are to be computed next."""
        return len(self.tokens) + self.pending - self.num_scheduled

    @property
    def awaits_token(self) -> bool:
        """Whether the host does not know all tokens before the one that a step, of which it is part
        already, samples."""
        return self.pending > 1

    @property
    def awaits_last(self) -> bool:
        """Whether the last token that it may have is, or may be, on its way: there is nothing to
        compute before that has landed."""
        return len(self.tokens) + self.pending + self.num_drafted >= self.max_len

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens that can ever be in the KV cache: the last output is never fed back."""
        return self.max_len - 1

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt tokens are still to be scored, so that none may be skipped."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len

    @property
    def skips_none(self) -> bool:
        """Whether a row of every token of the prompt is wanted, so that none may be taken from the
        prefix cache."""
        return self.scores_prompt or (self.pool is not None and self.pool.mode == "mean")

    @property
    def hands_over(self) -> bool:
        """Whether its prompt is computed and is now to go to another engine."""
        handover = self.request.handover
        waits = handover is not None and handover.stores and not handover.queued
        return waits and self.num_computed >= self.prompt_len

    def append(self, token: int) -> None:
        """Take a sampled token that has landed and set ``finish_reason`` if it is the last.

        Raises ``InvalidRequestError`` where its form cannot be followed any further.
        """
        self.pending -= 1
        self.tokens.append(token)
        self.output.append(token)
        constraint, count = self.constraint, len(self.output)
        if constraint is not None:
            constraint.take(token)
        if token in self.stop_token_ids and count >= self.request.params.min_tokens:
            self.finish_reason, self.ends_in_stop_token = "stop", True
            by_caller = token in self.request.params.stop_token_ids
            self.stop_reason = token if by_caller else None
        elif constraint is not None and constraint.complete:
            self.finish_reason, self.ends_in_stop_token = "stop", token in self.eos_token_ids
        elif count >= self.max_tokens:
            self.finish_reason = "length"

    def force(self, token: int) -> None:
        """The same for a token that the form leaves no choice about. If a step on its way samples
        one for its place, that is not awaited."""
        self.pending = max(1, self.pending)
        self.append(token)

    def constrained(self) -> Constraint | None:
        """The constraint, made when it is first asked for: there may be many siblings."""
        if self.constraint is None and self.request.grammar is not None:
            self.constraint = self.request.grammar.start()
        return self.constraint
