"""A model without weights: the next token is a closed form, and the KV cache holds the tokens."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import (
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


def logprob_of(token: int) -> float:
    """The made-up log probability of ``token``, exact in binary."""
    return -(1 + token % 8) / 8


class CountingExecutor:
    """Runs steps of the counting model and verifies that they were scheduled and paged correctly.

    Every step writes its token ids to their slots and reads each whole context back through the
    page table; anything but the tokens of the sequence is an ``AssertionError``. Set ``fail_next``
    to make the next step fail (and leave garbage in its slots); ``delay`` is seconds a step,
    ``steps`` counts them, and ``closed`` tells whether ``shutdown`` was called.

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
    ) -> None:
        self.delay = delay
        self.fail_next = False
        self.steps = 0
        self.closed = False
        self._runs_ahead = runs_ahead
        self._num_pages = num_pages
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._memory = np.full(num_pages * page_size, _GARBAGE, np.int32)
        # What the step before sampled, by the slot of the sequence.
        self._last_tokens: dict[int, int] = {}
        self._on_their_way: deque[CountingStep] = deque()

    @property
    def runs_ahead(self) -> bool:
        """As given at construction."""
        return self._runs_ahead

    def runs_ahead_of(self, params: SamplingParams) -> bool:
        """Whether ``params`` have no bad words of several tokens: an example of what needs the
        host."""
        return all(len(word) == 1 for word in params.bad_words_token_ids)

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
        self._memory[batch.slot_mapping] = _GARBAGE
        self._last_tokens = dict.fromkeys(batch.sampling_slots.tolist(), _GARBAGE)

    def _run(self, batch: StepBatch, excused: bool) -> StepResult:
        """Compute a step; only what ``excused`` sequences read may be garbage."""
        assert len(np.unique(batch.slot_mapping)) == len(batch.token_ids), "a slot written twice"
        assert len(np.unique(batch.slots)) == len(batch.slots), "two sequences in a slot"
        self._memory[batch.slot_mapping] = self._token_ids(batch)
        contexts = [self._context(batch, s) for s in range(len(batch.context_len))]
        result = StepResult([], [])
        last_tokens: dict[int, int] = {}
        owners = np.searchsorted(batch.query_start, batch.logits_rows, side="right") - 1
        for index, (owner, row) in enumerate(zip(owners, batch.sampling, strict=True)):
            token_row = batch.logits_rows[index]
            context = contexts[owner][: batch.positions[token_row] + 1]
            if not (excused and _GARBAGE in context):
                _check_row(context, row, num_unknown=int(batch.token_ids[token_row] < 0))
            token = self._next(int(context[-1]), row)
            result.token_ids.append(token if row.target is None else -1)
            result.logprobs.append(_logprobs(token, row))
            slot = -1 if row.target is not None else batch.slots[owner]
            assert batch.sampling_slots[index] == slot, "a token for another slot"
            last_tokens[int(slot)] = token
        self._last_tokens = last_tokens
        return result

    def _token_ids(self, batch: StepBatch) -> IntArray:
        """The tokens of a step, with those that only the device knows put in."""
        token_ids = batch.token_ids.copy()
        owners = np.repeat(batch.slots, np.diff(batch.query_start))
        for row in np.flatnonzero(token_ids < 0):
            assert self._on_their_way, "the host knows this token"
            token_ids[row] = self._last_tokens[int(owners[row])]
        return token_ids

    def _context(self, batch: StepBatch, index: int) -> IntArray:
        """Read one sequence's tokens back through its page table."""
        begin, end = batch.query_start[index : index + 2]
        length, size = int(batch.context_len[index]), self._page_size
        positions = np.arange(length - (end - begin), length)
        pages = batch.page_table[index, : -(-length // size)]
        slots = (pages[:, None] * size + np.arange(size)).ravel()[:length]
        assert np.array_equal(batch.positions[begin:end], positions), "wrong positions"
        assert np.array_equal(batch.slot_mapping[begin:end], slots[positions]), "wrong slots"
        context: IntArray = self._memory[slots]
        return context

    def _next(self, token: int, row: SamplingRow) -> int:
        if row.target is not None:
            return row.target
        if token == _GARBAGE:
            return _GARBAGE
        return next_token(token, self._vocab_size, row.seed if row.params.temperature else 0)


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


def _check_row(context: IntArray, row: SamplingRow, num_unknown: int) -> None:
    """Compare what was read for a row with what the host knows, all but ``num_unknown`` tokens."""
    known = [*row.prompt, *row.output]
    size = min(len(context), len(known))
    assert context[:size].tolist() == known[:size], "pages hold another sequence"
    if row.target is None:
        assert len(context) == len(known) + num_unknown, "sampled too early"
        assert row.position == len(context) - len(row.prompt), "sampled at another position"


def _logprobs(token: int, row: SamplingRow) -> TokenLogprobs | None:
    wanted = row.params.logprobs if row.target is None else row.params.prompt_logprobs
    if wanted is None:
        return None
    logprob = logprob_of(token)
    return TokenLogprobs(token, logprob, 1, {token: (logprob, 1)})
