"""What one step asks of an executor and what it answers: the contract between scheduler and
device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import TARGET_GRAPH, Port
from slipstream.errors import ExecutionError
from slipstream.runtime.engine.host_pages import Transfer
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from slipstream.runtime.sampling.logits_processors import Edits
    from slipstream.runtime.structured.grammar import Constraint

IntArray = NDArray[np.int32]
# The token of a logits row whose guess, or one before it, was not accepted.
REJECTED = -2


@dataclass(slots=True)
class SamplingRow:
    """How to turn one row of logits into a token, or into the logprob of a given prompt token.

    ``prompt`` and ``output`` are the live token lists of the sequence (never copied; penalties and
    bad words read them). ``position`` is the number of output tokens before the one to be sampled:
    it addresses the random stream and counts towards ``min_tokens``. It exceeds ``len(output)``
    when the device runs ahead of what the host knows. ``target`` is set on rows that only score
    that prompt token, whose place in the prompt is then ``position``; ``pooled`` on rows whose
    states are pooled, which a sequence shares: those from the prompt token at ``position`` on.
    ``edits`` are those of its logits, as whoever makes them remembers them. ``constraint`` says
    which tokens may come next after ``output``, and ``mask`` has that for a step, once asked: int32
    words of bits. ``drafts`` are tokens that the host has guessed to come after ``output`` and
    before the one to be sampled: the row counts if the rows before it sample them. A row whose
    ``position`` is less than ``len(output)`` samples what is known already; nobody reads it.
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    target: int | None = None
    position: int = 0
    edits: Edits | None = None
    pooled: bool = False
    constraint: Constraint | None = None
    mask: IntArray | None = None
    drafts: Sequence[int] = ()

    @property
    def form(self) -> Constraint | None:
        """Where the form of the row is after its drafts."""
        if self.constraint is None or not self.drafts:
            return self.constraint
        return self.constraint.after(self.drafts)


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """Where a step finds and puts what it keeps in one paged cache; int32.

    ``page_table[S, P]`` and ``slot_mapping[T]`` (page * page_size + offset).
    """

    page_table: IntArray
    slot_mapping: IntArray


@dataclass(frozen=True, slots=True)
class Guessing:
    """What a device that guesses by itself is to do after a step: ``count`` tokens of every
    sequence. int32 ``next_tokens[S]``, the token after those of the step, -1 where that is sampled,
    and ``capacity[S]``, how many tokens the pages of a sequence hold."""

    count: int
    next_tokens: IntArray
    capacity: IntArray


@dataclass(slots=True)
class StepBatch:
    """One packed step of a ``graph``: prefill chunks and decodes side by side, no padding.

    Arrays are int32. T tokens, S sequences, L logits rows. ``token_ids[T]``, ``positions[T]``,
    ``query_start[S+1]``, ``context_len[S]`` (tokens in the cache after this step),
    ``logits_rows[L]`` (token rows whose logits are wanted), one ``SamplingRow`` a logits row, and
    the ``pages`` of every paged cache by its name. ``outputs`` names what is wanted of the graph
    beside its logits. Arrays that can be written to may change with the next batch: they are read
    before it is built.

    ``slots[S]`` numbers each sequence from 0 below ``max_batch_size``, unchanged while it runs. A
    device that runs ahead keeps the last sampled token of every slot: ``sampling_slots[L]`` says
    where a row's token goes (-1 for a row that only scores a prompt token), and a token id of -1
    stands for the token that the step before put into the slot of its sequence.

    The last ``drafts[s]`` tokens of a sequence are guesses, -1 too if only the device knows them,
    and its logits rows are the last ``1 + drafts[s]``: a guess is accepted if the row before it,
    which was accepted, samples the same. If the device knows, by a first token of -1, that the step
    before ended in a run of more than one token, it adds what exceeds one to the positions of the
    sequence, here and in its sampling rows; its pages have room for that. Guesses that only the
    device knows are what it has guessed after the last step of the sequence.

    Before its layers run, a step makes ``transfers`` from and to the host, one after the other, and
    then ``moves``, whose pages are read as the step before left them.
    ``hidden[T, width]``, float32, is what a head takes of each token; None in other graphs.
    ``guessing`` is for a device that runs a head after the step (``GuessingExecutor``).
    """

    token_ids: IntArray
    positions: IntArray
    query_start: IntArray
    context_len: IntArray
    logits_rows: IntArray
    sampling: list[SamplingRow]
    slots: IntArray
    sampling_slots: IntArray
    pages: dict[str, PagedInputs]
    graph: str = TARGET_GRAPH
    outputs: tuple[str, ...] = ()
    drafts: Sequence[int] = ()
    moves: Sequence[Move] = ()
    transfers: Sequence[Transfer] = ()
    hidden: NDArray[np.float32] | None = None
    guessing: Guessing | None = None

    @property
    def longest_context(self) -> IntArray:
        """The largest of ``context_len [1]``."""
        longest: IntArray = self.context_len.max(keepdims=True)
        return longest


def reader_of(port: Port) -> Callable[[StepBatch], NDArray[Any]]:
    """How to take what a step puts into an input, found once for many steps."""
    read: Callable[[object], NDArray[Any]] = attrgetter(port.source.value)
    if port.cache is None:
        return read
    cache = port.cache
    return lambda batch: read(batch.pages[cache])


@dataclass(slots=True)
class TokenLogprobs:
    """Log probability and rank of one token, and of the most likely ones: ``{token_id: (logprob,
    rank)}``."""

    token_id: int
    logprob: float
    rank: int
    top: dict[int, tuple[float, int]]

    def only(self, count: int) -> TokenLogprobs:
        """With no more than ``count`` of the most likely (-1: all)."""
        if not 0 <= count < len(self.top):
            return self
        top = dict(itertools.islice(self.top.items(), count))
        return TokenLogprobs(self.token_id, self.logprob, self.rank, top)


class Guesses(Protocol):
    """What a device guesses after a step, which it may still be at when the step has landed."""

    def rows(self) -> list[list[int]]:
        """Wait for the guesses of each sequence, -1 from where there are none; before the device is
        given two more steps. Raises ``RuntimeError`` if the device failed."""
        ...


@dataclass(slots=True)
class StepResult:
    """Token and logprobs (where asked) of every logits row.

    The token is -1 on rows that only score a prompt token, or are pooled. The rows of a sequence
    with guesses give a run: a token for each row up to the first whose guess was wrong,
    ``REJECTED`` after that. ``failed`` says why a row, by its number, has no answer; its token
    means nothing. ``outputs`` are the further outputs that were asked for, by name; ``guesses``
    those of a device that guesses, where the step asked for some; ``right`` says then of each of
    its sequences how many of the tokens that were guessed before the step, one after the other, are
    those that came, verified or not, as far as the step shows.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    outputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    failed: dict[int, ExecutionError] = field(default_factory=dict)
    guesses: Guesses | None = None
    right: list[int] | None = None


def reject(rows: Sequence[SamplingRow], result: StepResult) -> None:
    """Mark the rows whose drafts, guessed by the host, are not what the rows before them sampled:
    nothing is told of them."""
    tokens = result.token_ids
    for index, row in enumerate(rows):
        if row.drafts and tokens[index - 1] != row.drafts[-1]:
            tokens[index], result.logprobs[index] = REJECTED, None
            result.failed.pop(index, None)
