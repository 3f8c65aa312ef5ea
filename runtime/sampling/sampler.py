"""From logits to tokens on the CPU: a batch at once when greedy, otherwise row by row.

Every row is computed alone, so that a result never depends, to the last bit, on what shares its
batch; with vocabularies of tens of thousands the work inside a row is what costs, not the loop
over rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import SamplingRow, StepResult, TokenLogprobs
from slipstream.runtime.sampling.candidates import draw_token, largest
from slipstream.runtime.sampling.logits_processors import process_logits
from slipstream.runtime.structured.masks import MaskFiller

Logits = NDArray[np.float32]


class Sampler:
    """Turns rows of logits into tokens and log probabilities; used from one thread."""

    def __init__(self, vocab_size: int, num_threads: int | None = None) -> None:
        """``vocab_size`` is the width of the logits, which may exceed the number of tokens;
        ``num_threads`` fill masks."""
        self._vocab_size = vocab_size
        self._uniforms = UniformStream()
        self._filler = MaskFiller(vocab_size, num_threads)

    def constrain(self, rows: Sequence[SamplingRow]) -> None:
        """Find out what may come next in rows that have a form; before ``sample``, and when the
        host knows their output."""
        held = [row for row in rows if row.constraint is not None]
        if not held:
            return
        masks = np.empty((len(held), self._filler.words), np.int32)
        self._filler.fill([row.constraint for row in held if row.constraint], masks)
        for row, mask in zip(held, masks, strict=True):
            row.mask = mask

    def sample(self, logits: Logits, rows: Sequence[SamplingRow]) -> StepResult:
        """Sample ``logits`` (float32 [L, V], not changed) with one row of parameters each.

        Log probabilities are those of the model's own logits, before any processing. A row that
        holds NaN, +inf or nothing but -inf has failed.
        """
        assert logits.shape == (len(rows), self._vocab_size), (logits.shape, len(rows))
        if all(_is_plain_greedy(row) for row in rows):
            return _argmax_rows(logits)
        result = StepResult([-1] * len(rows), [None] * len(rows))
        with np.errstate(over="ignore"):  # differences of extreme logits may become -inf, rightly
            for index, row in enumerate(rows):
                try:
                    token, logprobs = self._sample_row(logits[index], row)
                except ExecutionError as error:
                    result.failed[index] = error
                else:
                    result.token_ids[index], result.logprobs[index] = token, logprobs
        return result

    def _sample_row(self, logits: Logits, row: SamplingRow) -> tuple[int, TokenLogprobs | None]:
        if row.target is not None:
            return -1, token_logprobs(logits, row.target, row.params.prompt_logprobs or 0)
        token = self._choose(logits, row)
        if row.params.logprobs is None:
            return token, None
        listed = row.params.logprob_token_ids
        return token, token_logprobs(logits, token, row.params.logprobs, listed)

    def _choose(self, logits: Logits, row: SamplingRow) -> int:
        edited = process_logits(logits, row)
        best = int(edited.argmax())  # NumPy's argmax finds a NaN first
        top = edited[best]
        if top == -np.inf:
            return _least_forbidden(logits, row)
        _check_peak(top)
        if row.params.greedy:
            return best
        uniform = self._uniforms.at(row.seed, row.position)
        return draw_token(edited, top, row.params, uniform)


class UniformStream:
    """Random numbers addressed by (seed, position), from the counter-based generator Philox4x64.

    No state is carried from draw to draw, so preemption, the batch and other requests cannot
    change them (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """

    def __init__(self) -> None:
        """Keep one generator: setting its state costs a third of making one."""
        self._generator = np.random.Philox(key=0)
        self._counter = np.zeros(4, np.uint64)
        self._key = np.zeros(2, np.uint64)
        self._state: Any = {
            **self._generator.state,
            "state": {"counter": self._counter, "key": self._key},
        }

    def at(self, seed: int, position: int) -> float:
        """The number in [0, 1) of this ``seed`` (taken modulo 2**64) at this output position."""
        self._key[0] = seed % 2**64
        self._counter[0] = position
        self._generator.state = self._state
        return (int(self._generator.random_raw()) >> 11) * 2.0**-53


def token_logprobs(
    logits: Logits, token: int, count: int, listed: Sequence[int] | None = None
) -> TokenLogprobs:
    """Log probability and rank of ``token`` and the ``count`` likeliest (-1: all) in ``logits[V]``,
    or, in their place, of those that are ``listed``.

    Rank 1 is the likeliest; equal tokens rank in the order of their ids.
    """
    best = logits.max()
    _check_peak(best)
    normalizer = float(best) + math.log(float(np.exp(logits - best).sum()))
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


def _is_plain_greedy(row: SamplingRow) -> bool:
    params = row.params
    return (
        params.greedy
        and not params.edits_logits
        and params.logprobs is None
        and row.target is None
        and row.position >= params.min_tokens
    )


def _argmax_rows(logits: Logits) -> StepResult:
    tokens = logits.argmax(axis=1)
    peaks = logits[np.arange(len(tokens)), tokens]
    result = StepResult(tokens.tolist(), [None] * len(tokens))
    finite = np.isfinite(peaks)
    if not finite.all():
        result.failed = {int(row): broken_row(peaks[row]) for row in np.flatnonzero(~finite)}
    return result


def broken_row(peak: object) -> ExecutionError:
    """What to say of a row of logits whose largest is ``peak``."""
    return ExecutionError(
        f"the largest logit of a row is {peak}, expected a finite number; the engine or its "
        "numerics are broken: build it again"
    )


def _check_peak(peak: np.float32) -> None:
    if not math.isfinite(peak):
        raise broken_row(peak)


def _least_forbidden(logits: Logits, row: SamplingRow) -> int:
    # Bad words and the minimum length can together forbid every token that allowed_token_ids
    # allows. A sequence must go on all the same: the allow list holds, the others give way.
    if row.params.allowed_token_ids is None:
        best = int(logits.argmax())
    else:
        allowed = row.params.allowed_token_ids
        best = int(allowed[int(logits[list(allowed)].argmax())])
    _check_peak(logits.max())
    return best
