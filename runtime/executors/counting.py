"""A model without weights: the next token is a closed form, and the KV cache holds the tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.step import (
    REJECTED,
    IntArray,
    SamplingRow,
    StepBatch,
    StepResult,
    TokenLogprobs,
)
from slipstream.runtime.sampling.params import SamplingParams

_GARBAGE = -1


def next_token(token: int, vocab_size: int, seed: int = 0) -> int:
    """What follows ``token``; a sampled (not greedy) sequence strides by 1 + ``seed``."""
    return (token + 1 + seed) % vocab_size


def run_length(token: int, position: int, drafts: int) -> int:
    """How many tokens a step gives that computes ``token`` at ``position`` and guesses ``drafts``
    tokens after it."""
    return 1 + (token + position) % (drafts + 1)


def logprob_of(token: int) -> float:
    """The made-up log probability of ``token``, exact in binary."""
    return -(1 + token % 8) / 8


class CountingExecutor:
    """Runs steps of the counting model and verifies that they were scheduled and paged correctly.

    Every step writes its token ids to their slots and reads each whole context back through the
    page table; anything but the tokens of the sequence is an ``AssertionError``. Set ``fail_next``
    to make the next step fail (and leave garbage in its slots); ``delay`` is seconds a step,
    ``steps`` counts them, and ``closed`` tells whether ``shutdown`` was called.

    It guesses ``draft_tokens`` tokens at a time, of which ``run_length`` tells how many are right.
    A row that would give ``broken_token`` fails.

    With ``runs_ahead`` it takes two steps at a time and puts in the tokens that the host does not
    know. It does so in ``submit``, as a device that is infinitely fast, but keeps the answer until
    it is asked for.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        vocab_size: int,
        *,
        delay: float = 0.0,
        runs_ahead: bool = False,
        draft_tokens: int = 0,
    ) -> None:
        self.delay = delay
        self.fail_next = False
        self.broken_token: int | None = None
        self.steps = 0
        self.closed = False
        self._runs_ahead = runs_ahead
        self._draft_tokens = draft_tokens
        self._num_pages = num_pages
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._memory = np.full(num_pages * page_size, _GARBAGE, np.int32)
        # The last token of what the step before sampled and the length of the run, by slot.
        self._last_runs: dict[int, tuple[int, int]] = {}
        self._on_their_way: deque[CountingStep] = deque()

    @property
    def runs_ahead(self) -> bool:
        """As given at construction."""
        return self._runs_ahead

    def runs_ahead_of(self, params: SamplingParams) -> bool:
        """Whether ``params`` have no bad words of several tokens: an example of what needs the
        host."""
        return all(len(word) == 1 for word in params.bad_words_token_ids)

    @property
    def draft_tokens(self) -> int:
        """As given at construction."""
        return self._draft_tokens

    def reserve_kv(self, num_bytes: int | None) -> int:
        """The number of pages given at construction; a page has no bytes."""
        return self._num_pages

    def submit(self, batch: StepBatch) -> CountingStep:
        """Run a step whose result is handed over when it is wanted."""
        failing, self.fail_next = self.fail_next, False
        in_lockstep = not all(map(self._may_run_ahead, batch.sampling))
        self._check_order(in_lockstep)
        self.steps += 1
        # What follows a step that fails works on garbage until the host has heard of it.
        excused = any(step.failed for step in self._on_their_way)
        result = None
        if failing:
            self._spoil(batch)
        else:
            result = self._run(batch, excused)
        step = CountingStep(self, result, in_lockstep)
        self._on_their_way.append(step)
        return step

    def land(self, step: CountingStep) -> None:
        """Note that a step's result is handed over."""
        assert self._on_their_way.popleft() is step, "results are taken out of order"
        if self.delay:
            time.sleep(self.delay)

    def shutdown(self) -> None:
        """Only remembered: there is nothing to free."""
        self.closed = True

    def _may_run_ahead(self, row: SamplingRow) -> bool:
        return row.target is None and self.runs_ahead_of(row.params)

    def _check_order(self, in_lockstep: bool) -> None:
        others = self._on_their_way
        assert len(others) <= self._runs_ahead, "too many steps on their way"
        in_lockstep = in_lockstep or any(step.in_lockstep for step in others)
        assert not (others and in_lockstep), "the host must know all tokens before this step"

    def _spoil(self, batch: StepBatch) -> None:
        """Leave garbage wherever a step would have written."""
        for index in range(len(batch.context_len)):
            chunk = self._chunk(batch, index)
            self._memory[chunk.slots[chunk.start :]] = _GARBAGE
        self._last_runs = dict.fromkeys(batch.sampling_slots.tolist(), (_GARBAGE, 1))

    def _run(self, batch: StepBatch, excused: bool) -> StepResult:
        """Compute a step; only what ``excused`` sequences read may be garbage."""
        assert len(np.unique(batch.slots)) == len(batch.slots), "two sequences in a slot"
        self._move_pages(batch.moves)
        chunks = [self._chunk(batch, s) for s in range(len(batch.context_len))]
        written = np.concatenate([chunk.slots[chunk.start :] for chunk in chunks])
        assert len(np.unique(written)) == len(batch.token_ids), "a slot written twice"
        self._memory[written] = np.concatenate([chunk.tokens for chunk in chunks])
        contexts = [self._memory[chunk.slots] for chunk in chunks]
        result = StepResult([], [])
        last_runs: dict[int, tuple[int, int]] = {}
        owners = np.searchsorted(batch.query_start, batch.logits_rows, side="right") - 1
        for index, (owner, row) in enumerate(zip(owners, batch.sampling, strict=True)):
            chunk, token_row = chunks[owner], batch.logits_rows[index]
            context = contexts[owner][: batch.positions[token_row] + chunk.surplus + 1]
            guesses = max(0, len(context) - len(contexts[owner]) + chunk.guesses)
            if not (excused and _GARBAGE in context):
                unknown = (1 + chunk.surplus) * chunk.is_ahead + guesses
                _check_row(context, row, unknown, chunk.surplus)
            token = self._next(int(context[-1]), row)
            slot = -1 if row.target is not None else int(batch.slots[owner])
            assert batch.sampling_slots[index] == slot, "a token for another slot"
            before = last_runs.get(slot) if guesses else None
            if guesses and (before is None or before != (int(context[-1]), guesses)):
                result.token_ids.append(REJECTED)
                result.logprobs.append(None)
                continue
            if token == self.broken_token and row.target is None:
                result.failed[index] = ExecutionError("the counting executor broke this token")
            result.token_ids.append(token if row.target is None else -1)
            result.logprobs.append(_logprobs(token, row))
            last_runs[slot] = (token, guesses + 1)
        self._last_runs = last_runs
        return result

    def _move_pages(self, moves: Sequence[Move]) -> None:
        """Copy pages, all of them as the step before left them."""
        targets = [move.destination for move in moves]
        assert len(set(targets)) == len(moves), "a page moved over another"
        assert not set(targets) & {move.source for move in moves}, "a page moved on"
        pages = self._memory.reshape(-1, self._page_size)
        for move in moves:
            pages[move.destination] = pages[move.source]

    def _chunk(self, batch: StepBatch, index: int) -> _Chunk:
        """Check how one sequence was packed; put in what only the device knows."""
        begin, end = batch.query_start[index : index + 2]
        tokens, length = batch.token_ids[begin:end].copy(), int(batch.context_len[index])
        guesses = batch.drafts[index] if batch.drafts else 0
        assert 0 <= guesses <= min(self._draft_tokens, len(tokens) - 1), "too many guesses"
        start = length - len(tokens)
        slots = self._slots(batch.page_table[index], length)
        positions = np.arange(start, length)
        assert np.array_equal(batch.positions[begin:end], positions), "wrong positions"
        assert np.array_equal(batch.slot_mapping[begin:end], slots[positions]), "wrong slots"
        is_ahead, surplus = bool(tokens[0] < 0), 0
        if is_ahead:
            assert self._on_their_way, "the host knows this token"
            tokens[0], run = self._last_runs[int(batch.slots[index])]
            surplus = run - 1
        if guesses:
            row = batch.sampling[int(np.searchsorted(batch.logits_rows, end - 1))]
            tokens[-guesses:] = self._guess(int(tokens[0]), start + surplus, guesses, row)
        garbage = is_ahead and tokens[0] == _GARBAGE
        assert garbage or (tokens >= 0).all(), "a token that nobody knows"
        slots = self._slots(batch.page_table[index], length + surplus)
        return _Chunk(tokens, slots, start + surplus, guesses, is_ahead, surplus)

    def _slots(self, pages: IntArray, length: int) -> IntArray:
        """The slots of the first ``length`` tokens of a sequence with these pages."""
        size = self._page_size
        used = pages[: -(-length // size)]
        assert len(used) * size >= length, "no page for a token"
        slots: IntArray = (used[:, None] * size + np.arange(size)).ravel()[:length]
        return slots

    def _guess(self, token: int, position: int, count: int, row: SamplingRow) -> list[int]:
        """What is guessed to follow ``token``, right up to the length of the run."""
        right = run_length(token, position, count) - 1
        guesses: list[int] = []
        for place in range(count):
            token = self._next(token, row)
            guesses.append(token if place < right else self._next(token, row))
        return guesses

    def _next(self, token: int, row: SamplingRow) -> int:
        if row.target is not None:
            return row.target
        if token == _GARBAGE:
            return _GARBAGE
        return next_token(token, self._vocab_size, row.seed if row.params.temperature else 0)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What a step computes of one sequence: ``tokens`` from ``start`` on, of which the last
    ``guesses`` are the device's own, and the ``slots`` of all tokens so far.

    ``is_ahead``: the host does not know the first, nor that the run before exceeds one token by
    ``surplus``.
    """

    tokens: IntArray
    slots: IntArray
    start: int
    guesses: int
    is_ahead: bool
    surplus: int


class CountingStep:
    """A step on its way; it has failed if there is no ``result``."""

    def __init__(
        self, executor: CountingExecutor, result: StepResult | None, in_lockstep: bool
    ) -> None:
        self.in_lockstep = in_lockstep
        self._executor = executor
        self._result = result

    @property
    def failed(self) -> bool:
        """Whether ``result`` will raise."""
        return self._result is None

    def result(self) -> StepResult:
        """Hand over what was computed."""
        self._executor.land(self)
        if self._result is None:
            raise ExecutionError("the counting executor was told to fail this step")
        return self._result


def _check_row(context: IntArray, row: SamplingRow, num_unknown: int, surplus: int) -> None:
    """Compare what was read for a row with what the host knows, all but ``num_unknown`` tokens."""
    known = [*row.prompt, *row.output]
    size = min(len(context), len(known))
    assert context[:size].tolist() == known[:size], "pages hold another sequence"
    if row.target is None:
        assert len(context) == len(known) + num_unknown, "sampled too early"
        position = row.position + surplus
        assert position == len(context) - len(row.prompt), "sampled at another position"


def _logprobs(token: int, row: SamplingRow) -> TokenLogprobs | None:
    wanted = row.params.logprobs if row.target is None else row.params.prompt_logprobs
    if wanted is None:
        return None
    logprob = logprob_of(token)
    return TokenLogprobs(token, logprob, 1, {token: (logprob, 1)})
