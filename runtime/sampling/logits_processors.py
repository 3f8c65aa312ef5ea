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

    __slots__ = ("_counted", "_counts", "_places", "_tokens", "allowed", "bias", "biased")

    def __init__(self, row: SamplingRow) -> None:
        params = row.params
        bias, allowed = params.logit_bias or {}, params.allowed_token_ids
        self.allowed = None if allowed is None else np.array(allowed, np.int64)
        self.biased = np.array(list(bias), np.int64)
        self.bias = np.array(list(bias.values()), np.float32)
        # Every token that the prompt or the output holds, and how often the output does.
        self._places: dict[int, int] = {}
        self._tokens = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._counted = 0
        if params.penalizes:
            self._meet(row.prompt)

    def penalize(self, edited: Logits, row: SamplingRow) -> None:
        """Lower what the prompt or the output holds."""
        params, new = row.params, row.output[self._counted :]
        self._meet(new)
        np.add.at(self._counts, [self._places[token] for token in new], 1)
        self._counted += len(new)
        tokens, counts = self._with(row.drafts) if row.drafts else (self._tokens, self._counts)
        values = edited[tokens]
        if params.repetition_penalty != 1:
            values = np.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.frequency_penalty or params.presence_penalty:
            values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        edited[tokens] = values

    def _with(self, drafts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and counts as they are if ``drafts`` are output, too."""
        unknown = [token for token in dict.fromkeys(drafts) if token not in self._places]
        more = {token: len(self._places) + i for i, token in enumerate(unknown)}
        counts = np.append(self._counts, np.zeros(len(unknown), np.int64))
        np.add.at(counts, [more.get(t, self._places.get(t, 0)) for t in drafts], 1)
        return np.append(self._tokens, np.array(unknown, np.int64)), counts

    def _meet(self, tokens: Sequence[int]) -> None:
        """Give tokens that are new a place."""
        unknown = [token for token in dict.fromkeys(tokens) if token not in self._places]
        if unknown:
            self._places |= {token: len(self._places) + i for i, token in enumerate(unknown)}
            self._tokens = np.append(self._tokens, np.array(unknown, np.int64))
            self._counts = np.append(self._counts, np.zeros(len(unknown), np.int64))


def edits_logits(row: SamplingRow) -> bool:
    """Whether a row's logits are not sampled as they are."""
    return row.params.edits_logits or row.position < row.params.min_tokens


def process_logits(logits: Logits, row: SamplingRow) -> Logits:
    """Apply allowed tokens, bad words, minimum length, logit bias, penalties and the form to
    ``logits[V]``.

    Returns ``logits`` itself when there is nothing to do and an edited copy otherwise; banned
    tokens get -inf.
    """
    params = row.params
    if not edits_logits(row):
        return logits
    if row.edits is None:
        row.edits = Edits(row)
    edits = row.edits
    edited = _only_allowed(logits, edits.allowed)
    output = [*row.output, *row.drafts] if row.drafts else row.output
    for token in completed_bad_words(params, output):
        edited[token] = -np.inf
    if row.position < params.min_tokens:
        edited[ending_tokens(row)] = -np.inf
    if params.logit_bias:
        edited[edits.biased] += edits.bias
    if params.penalizes:
        edits.penalize(edited, row)
    return edited if row.mask is None else _in_form(logits, edited, row.mask)


def _in_form(logits: Logits, edited: Logits, mask: Bits) -> Logits:
    allowed = allowed_tokens(mask, len(logits))
    np.copyto(edited, np.float32(-np.inf), where=~allowed)
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
