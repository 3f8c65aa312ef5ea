"""A model without weights: the next token is a closed form, and the KV cache holds the tokens."""

from __future__ import annotations

import time

import numpy as np

from slipstream.errors import ExecutionError
from slipstream.runtime.step import IntArray, SamplingRow, StepBatch, StepResult, TokenLogprobs

_GARBAGE = -1


def next_token(token: int, vocab_size: int, seed: int = 0) -> int:
    """What follows ``token``; a sampled (not greedy) sequence strides by 1 + ``seed``."""
    return (token + 1 + seed) % vocab_size


def logprob_of(token: int) -> float:
    """The made-up log probability of ``token``, exact in binary."""
    return -(1 + token % 8) / 8


class CountingExecutor:
    """Runs steps of the counting model and verifies that the scheduler paged them correctly.

    Every step writes its token ids to their slots and reads each whole context back through the
    page table; anything but the tokens of the sequence is an ``AssertionError``. Set ``fail_next``
    to make the next step fail (and leave garbage in its slots); ``delay`` is seconds a step,
    ``steps`` counts them, and ``closed`` tells whether ``shutdown`` was called.
    """

    def __init__(
        self, num_pages: int, page_size: int, vocab_size: int, *, delay: float = 0.0
    ) -> None:
        self.delay = delay
        self.fail_next = False
        self.steps = 0
        self.closed = False
        self._num_pages = num_pages
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._memory = np.full(num_pages * page_size, _GARBAGE, np.int32)

    def reserve_kv(self, num_bytes: int | None) -> int:
        """The number of pages given at construction; a page has no bytes."""
        return self._num_pages

    def submit(self, batch: StepBatch) -> CountingStep:
        """Start a step, which runs when its result is wanted."""
        failing, self.fail_next = self.fail_next, False
        return CountingStep(self, batch, failing)

    def shutdown(self) -> None:
        """Only remembered: there is nothing to free."""
        self.closed = True

    def run(self, batch: StepBatch, failing: bool) -> StepResult:
        """Compute a step."""
        self.steps += 1
        if self.delay:
            time.sleep(self.delay)
        if failing:
            self._memory[batch.slot_mapping] = _GARBAGE
            raise ExecutionError("the counting executor was told to fail this step")
        assert len(np.unique(batch.slot_mapping)) == len(batch.token_ids), "a slot written twice"
        self._memory[batch.slot_mapping] = batch.token_ids
        contexts = [self._context(batch, s) for s in range(len(batch.context_len))]
        result = StepResult([], [])
        owners = np.searchsorted(batch.query_start, batch.logits_rows, side="right") - 1
        for token_row, owner, row in zip(batch.logits_rows, owners, batch.sampling, strict=True):
            context = contexts[owner][: batch.positions[token_row] + 1]
            known = [*row.prompt, *row.output]
            assert context.tolist() == known[: len(context)], "pages hold another sequence"
            assert row.target is not None or len(context) == len(known), "sampled too early"
            token = self._next(int(context[-1]), row)
            result.token_ids.append(token if row.target is None else -1)
            result.logprobs.append(_logprobs(token, row))
        return result

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
        return next_token(token, self._vocab_size, row.seed if row.params.temperature else 0)


class CountingStep:
    """A step that is computed by ``result``, as a device that shares its core with us would."""

    def __init__(self, executor: CountingExecutor, batch: StepBatch, failing: bool) -> None:
        self._executor = executor
        self._batch = batch
        self._failing = failing

    def result(self) -> StepResult:
        """Compute the step."""
        return self._executor.run(self._batch, self._failing)


def _logprobs(token: int, row: SamplingRow) -> TokenLogprobs | None:
    wanted = row.params.logprobs if row.target is None else row.params.prompt_logprobs
    if wanted is None:
        return None
    logprob = logprob_of(token)
    return TokenLogprobs(token, logprob, 1, {token: (logprob, 1)})
