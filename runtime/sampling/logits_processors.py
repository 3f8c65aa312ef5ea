"""Edits of logits before temperature: what may be said, and what was said too often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.params import SamplingParams

Logits = NDArray[np.float32]


def process_logits(logits: Logits, row: SamplingRow) -> Logits:
    """Apply allowed tokens, bad words, minimum length, logit bias and penalties to ``logits[V]``.

    Returns ``logits`` itself when there is nothing to do and an edited copy otherwise; banned
    tokens get -inf.
    """
    params = row.params
    too_short = row.position < params.min_tokens
    if not (params.edits_logits or too_short):
        return logits
    edited = _only_allowed(logits, params)
    for token in completed_bad_words(params, row.output):
        edited[token] = -np.inf
    if too_short:
        edited[ending_tokens(row)] = -np.inf
    if params.logit_bias:
        edited[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.penalizes:
        _penalize(edited, row)
    return edited


def _only_allowed(logits: Logits, params: SamplingParams) -> Logits:
    if params.allowed_token_ids is None:
        return logits.copy()
    allowed = list(params.allowed_token_ids)
    edited = np.full_like(logits, -np.inf)
    edited[allowed] = logits[allowed]
    return edited


def completed_bad_words(params: SamplingParams, output: Sequence[int]) -> list[int]:
    """The tokens that would now complete a bad word begun in the output (not in the prompt)."""
    completed = []
    for *beginning, last in params.bad_words_token_ids:
        if not beginning or list(output[-len(beginning) :]) == beginning:
            completed.append(last)
    return completed


def ending_tokens(row: SamplingRow) -> list[int]:
    """The tokens that would end the row's sequence."""
    # With ignore_eos the end-of-sequence tokens end nothing, so they stay possible.
    ending = set(row.params.stop_token_ids)
    if not row.params.ignore_eos:
        ending |= row.eos_token_ids
    return list(ending)


def _penalize(edited: Logits, row: SamplingRow) -> None:
    # Counting afresh from the live lists costs about 40 ns a token: less than keeping counts right
    # through preemption and copies for n > 1 would cost in code.
    params = row.params
    output = np.asarray(row.output, np.int64)
    if params.repetition_penalty != 1:
        seen = np.concatenate([np.asarray(row.prompt, np.int64), output])
        values = edited[seen]
        # A token that occurs twice is written twice with the same value.
        edited[seen] = np.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.frequency_penalty or params.presence_penalty:
        counts = np.bincount(output)
        ids = np.flatnonzero(counts)
        edited[ids] -= params.frequency_penalty * counts[ids] + params.presence_penalty
