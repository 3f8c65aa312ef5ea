"""Edits of logits before temperature: what may be said, and what was said too often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.masks import Bits, allowed_tokens

Logits = NDArray[np.float32]


class Edits:
    """What the parameters and the tokens of one sequence ask of its logits, as arrays that are made
    once: a step costs what is new, however much there is."""

    __slots__ = ("_counted", "_counts", "_seen", "allowed", "bias", "biased")

    def __init__(self, row: SamplingRow, vocab_size: int) -> None:
        params = row.params
        bias, allowed = params.logit_bias or {}, params.allowed_token_ids
        self.allowed = None if allowed is None else np.array(allowed, np.int64)
        self.biased = np.array(list(bias), np.int64)
        self.bias = np.array(list(bias.values()), np.float32)
        self._counted = 0
        self._counts = np.zeros(vocab_size if params.penalizes else 0, np.int64)
        self._seen = np.zeros(len(self._counts), np.bool_)
        if params.penalizes:
            self._seen[list(row.prompt)] = True

    def penalize(self, edited: Logits, row: SamplingRow) -> None:
        """Lower what the prompt or the output holds."""
        params, new = row.params, row.output[self._counted :]
        np.add.at(self._counts, new, 1)
        self._seen[new] = True
        self._counted += len(new)
        if params.repetition_penalty != 1:
            seen = np.flatnonzero(self._seen)
            values = edited[seen]
            edited[seen] = np.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.frequency_penalty or params.presence_penalty:
            ids = np.flatnonzero(self._counts)
            edited[ids] -= params.frequency_penalty * self._counts[ids] + params.presence_penalty


def process_logits(logits: Logits, row: SamplingRow) -> Logits:
    """Apply allowed tokens, bad words, minimum length, logit bias, penalties and the form to
    ``logits[V]``.

    Returns ``logits`` itself when there is nothing to do and an edited copy otherwise; banned
    tokens get -inf.
    """
    params = row.params
    too_short = row.position < params.min_tokens
    if not (params.edits_logits or too_short):
        return logits
    if row.edits is None:
        row.edits = Edits(row, len(logits))
    edits = row.edits
    edited = _only_allowed(logits, edits.allowed)
    for token in completed_bad_words(params, row.output):
        edited[token] = -np.inf
    if too_short:
        edited[ending_tokens(row)] = -np.inf
    if params.logit_bias:
        edited[edits.biased] += edits.bias
    if params.penalizes:
        edits.penalize(edited, row)
    return edited if row.mask is None else _in_form(logits, edited, row.mask)


def _in_form(logits: Logits, edited: Logits, mask: Bits) -> Logits:
    allowed = allowed_tokens(mask, len(logits))
    edited[~allowed] = -np.inf
    if edited.max() > -np.inf:
        return edited
    # Nothing that the form allows may come next for other reasons: those give way.
    return np.where(allowed, logits, np.float32(-np.inf))


def _only_allowed(logits: Logits, allowed: NDArray[np.int64] | None) -> Logits:
    if allowed is None:
        return logits.copy()
    edited = np.full_like(logits, -np.inf)
    edited[allowed] = logits[allowed]
    return edited


def completed_bad_words(params: SamplingParams, output: Sequence[int]) -> list[int]:
    """The tokens that would now complete a bad word begun in the output (not in the prompt)."""
    completed = []
    for word in params.bad_words_token_ids:
        size = len(word) - 1
        # Most differ in the token before, and whole words are dear to compare.
        if not size or (output and output[-1] == word[-2] and tuple(output[-size:]) == word[:-1]):
            completed.append(word[-1])
    return completed


def ending_tokens(row: SamplingRow) -> list[int]:
    """The tokens that would end the row's sequence."""
    # With ignore_eos the end-of-sequence tokens end nothing, so they stay possible.
    ending = set(row.params.stop_token_ids)
    if not row.params.ignore_eos:
        ending |= row.eos_token_ids
    return list(ending)
