"""From logits to tokens on the CPU: the rows of a batch at once, but for those whose logits are
edited.

Every row is computed alone, so that a result never depends, to the last bit, on what shares its
batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import LOGITS, TOP_LOGIT, TOP_TOKEN
from slipstream.cores import usable_cores
from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import (
    REJECTED,
    SamplingRow,
    StepBatch,
    StepResult,
    TokenLogprobs,
    reject,
)
from slipstream.runtime.sampling.candidates import largest
from slipstream.runtime.sampling.draws import Drawer
from slipstream.runtime.sampling.logits_processors import edits_logits, process_logits
from slipstream.runtime.structured.masks import MaskFiller

Logits = NDArray[np.float32]
# Of every row the first token of those with the largest logit, and that logit: NaN if the row has
# one. Where it is not finite the token means nothing.
Tops = tuple[list[int], Sequence[float]]


class Sampler:
    """Turns rows of logits into tokens and log probabilities; used from one thread."""

    def __init__(self, vocab_size: int, num_threads: int | None = None) -> None:
        """``vocab_size`` is the width of the logits, which may exceed the number of tokens;
        ``num_threads``, None for as many as this process may use, fill masks and read logits."""
        self._vocab_size = vocab_size
        self._drawer = Drawer(vocab_size, num_threads or usable_cores())
        self._filler = MaskFiller(vocab_size, num_threads)

    def constrain(self, rows: Sequence[SamplingRow]) -> None:
        """Find out what may come next in rows that have a form; before ``sample``, and when the
        host knows their output."""
        held = []
        for row in rows:
            if row.constraint is not None:
                held.append(row)
        if not held:
            return
        masks = np.empty((len(held), self._filler.words), np.int32)
        self._filler.fill([form for row in held if (form := row.form) is not None], masks)
        for row, mask in zip(held, masks, strict=True):
            row.mask = mask

    def result(self, outputs: Mapping[str, NDArray[Any]], batch: StepBatch) -> StepResult:
        """What a step has made, of its outputs, which the next step may overwrite."""
        rows = len(batch.sampling)
        if LOGITS in outputs:
            tops = None
            if TOP_TOKEN in outputs:
                tops = outputs[TOP_TOKEN].tolist(), outputs[TOP_LOGIT].tolist()
            result = self.sample(outputs[LOGITS], batch.sampling, tops)
        else:
            result = StepResult([-1] * rows, [None] * rows)
        if batch.outputs:
            result.outputs = {name: outputs[name].copy() for name in batch.outputs}
        return result

    def sample(
        self, logits: Logits, rows: Sequence[SamplingRow], tops: Tops | None = None
    ) -> StepResult:
        """Sample ``logits`` (float32 [L, V], not changed) with one row of parameters each.

        ``tops`` are what the graph has found, whose rows of logits are not read where they are all
        that is asked; None if it looks for none.

        Log probabilities are those of the model's own logits, before any processing. A row after
        a draft is rejected if the row before it has sampled another token. A row that
        holds NaN, +inf or nothing but -inf has failed.
        """
        assert logits.shape == (len(rows), self._vocab_size), (logits.shape, len(rows))
        if _are_plain(rows):
            return likeliest(tops or _search(logits))
        result = StepResult([-1] * len(rows), [None] * len(rows))
        greedy: list[int] = []
        drawn: list[int] = []
        for index, row in enumerate(rows):
            if row.target is not None:
                continue
            if edits_logits(row):
                self._draw_edited(logits, index, row, result)
            else:
                (greedy if row.params.greedy else drawn).append(index)
        if tops is None and len(greedy) == len(rows):  # which costs half of a call of the kernel
            tops = _search(logits)
        if tops is None:
            drawn += greedy
        else:
            for index in greedy:
                _put(result, index, tops[0][index], tops[1][index])
        if drawn:
            tokens, peaks = self._drawer.draw(logits, drawn, [rows[index] for index in drawn])
            for index, token, peak in zip(drawn, tokens, peaks, strict=True):
                _put(result, index, token, peak)
        reject(rows, result)
        _score(logits, rows, result)
        return result

    def _draw_edited(
        self, logits: Logits, index: int, row: SamplingRow, result: StepResult
    ) -> None:
        edited = process_logits(logits[index], row)
        (token,), (peak,) = self._drawer.draw(edited[None], [0], [row])
        if peak == -math.inf:
            token, peak = _least_forbidden(logits[index], row)
        _put(result, index, token, peak)


def likeliest(tops: Tops) -> StepResult:
    """The result of rows of which nothing is asked but the first of the largest logits."""
    tokens, peaks = tops
    result = StepResult(tokens, [None] * len(tokens))
    if not math.isfinite(sum(peaks)):
        for index, peak in enumerate(peaks):
            if not math.isfinite(peak):
                tokens[index], result.failed[index] = -1, broken_row(peak)
    return result


def _search(logits: Logits) -> Tops:
    tokens: list[int] = logits.argmax(axis=1).tolist()
    return tokens, [float(logits[index, token]) for index, token in enumerate(tokens)]


def _are_plain(rows: Sequence[SamplingRow]) -> bool:
    """Whether of each row nothing is asked but the first of the largest."""
    for row in rows:  # noqa: SIM110 - every step asks, and all() is slower
        if not row.params.plain or row.drafts or row.target is not None:
            return False
    return True


def _put(result: StepResult, index: int, token: int, peak: float | np.float32) -> None:
    """A row's token, whose logits have failed if the largest is not finite."""
    if math.isfinite(peak):
        result.token_ids[index] = token
    else:
        result.failed[index] = broken_row(peak)


def _score(logits: Logits, rows: Sequence[SamplingRow], result: StepResult) -> None:
    """Fill in the log probabilities that rows want."""
    for index, row in enumerate(rows):
        params, token, count = row.params, result.token_ids[index], row.params.logprobs
        listed = params.logprob_token_ids
        if row.target is not None:
            token, count, listed = row.target, params.prompt_logprobs or 0, None
        if count is None or token == REJECTED or index in result.failed:
            continue
        try:
            result.logprobs[index] = token_logprobs(logits[index], token, count, listed)
        except ExecutionError as error:
            result.token_ids[index], result.failed[index] = -1, error


def token_logprobs(
    logits: Logits, token: int, count: int, listed: Sequence[int] | None = None
) -> TokenLogprobs:
    """Log probability and rank of ``token`` and the ``count`` likeliest (-1: all) in ``logits[V]``,
    or, in their place, of those that are ``listed``.

    Rank 1 is the likeliest; equal tokens rank in the order of their ids.
    """
    best = logits.max()
    if not math.isfinite(best):
        raise broken_row(best)
    with np.errstate(over="ignore"):  # differences of extreme logits may become -inf, rightly
        weights = logits - best
    normalizer = float(best) + math.log(float(np.exp(weights, out=weights).sum()))
    own = float(logits[token]) - normalizer, _rank(logits, token)
    if listed is not None:
        entries = {i: (float(logits[i]) - normalizer, _rank(logits, i)) for i in listed}
        return TokenLogprobs(token, *own, entries)
    if count < 0:
        ids = np.argsort(-logits, kind="stable")
    else:
        ids = largest(logits, count)[:count] if count else np.empty(0, np.int64)
    values = logits[ids].astype(np.float64) - normalizer
    top = {
        int(i): (float(value), rank)
        for rank, (i, value) in enumerate(zip(ids, values, strict=True), start=1)
    }
    return TokenLogprobs(token, *own, top)


def _rank(logits: Logits, token: int) -> int:
    own = logits[token]
    above = np.count_nonzero(logits > own) + np.count_nonzero(logits[:token] == own)
    return int(above) + 1


def broken_row(peak: object) -> ExecutionError:
    """What to say of a row of logits whose largest is ``peak``."""
    return ExecutionError(
        f"the largest logit of a row is {peak}, expected a finite number; the engine or its "
        "numerics are broken: build it again"
    )


def _least_forbidden(logits: Logits, row: SamplingRow) -> tuple[int, float]:
    # Bad words and the minimum length can together forbid every token that allowed_token_ids
    # allows. A sequence must go on all the same: the allow list holds, the others give way.
    allowed = row.params.allowed_token_ids
    if allowed is None:
        best = int(logits.argmax())
    else:
        best = int(allowed[int(logits[list(allowed)].argmax())])
    return best, float(logits.max())
