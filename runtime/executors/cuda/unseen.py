"""Drafts that the host has not seen when it plans their step: the device has guessed them, puts
them in, and goes on from those that are right. The host finds the same when the step has landed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slipstream.plugins.drafting import COLUMNS
from slipstream.runtime.engine.step import REJECTED, IntArray, StepBatch, StepResult


@dataclass(frozen=True, slots=True)
class Unseen:
    """What was guessed of the S sequences of a step before it, in ``slots [S]`` of ``guessed
    [slots, COLUMNS]``, which is there when the step is; how many of their tokens are such
    ``drafts [S]``; and the places in the batch of the rows that they sample: from ``firsts [S]``
    on, -1 for none."""

    guessed: IntArray
    slots: IntArray
    drafts: IntArray
    firsts: IntArray
    vocab_size: int

    @classmethod
    def of(
        cls, batch: StepBatch, places: Sequence[int], guessed: IntArray, vocab_size: int
    ) -> Unseen:
        """Those of a batch, of which the rows in ``places`` are sampled."""
        ends = batch.query_start[1:]
        drafts = np.array(batch.drafts, np.int32) if len(batch.drafts) else ends * 0
        drafts = np.where(batch.token_ids[ends - 1] < 0, drafts, 0)  # else the host has put them in
        wanted = np.array(places, np.int32)
        rows = batch.logits_rows[wanted]
        begins = ends - 1 - drafts
        found = np.minimum(np.searchsorted(rows, begins), len(rows) - 1)
        firsts = np.where(rows[found] == begins, wanted[found], -1)
        return cls(guessed, batch.slots, drafts, firsts, vocab_size)

    def reject(self, result: StepResult) -> None:
        """Mark the rows after wrong drafts, and say of every sequence how many guesses, verified or
        not, were what came."""
        columns = np.arange(COLUMNS)
        tokens = np.array(result.token_ids, np.int32)
        guesses = self.guessed[self.slots]
        guesses = np.where((guesses >= 0) & (guesses < self.vocab_size), guesses, 0)
        sampled = (columns <= self.drafts[:, None]) & (self.firsts >= 0)[:, None]
        rows = np.where(sampled, self.firsts[:, None] + columns, 0)
        right = sampled & (tokens[rows] == guesses)
        result.right = np.minimum.accumulate(right, axis=1).sum(1).tolist()
        wrong = sampled & (columns > np.array(result.right)[:, None])
        for row in rows[wrong].tolist():
            result.token_ids[row], result.logprobs[row] = REJECTED, None
            result.failed.pop(row, None)
