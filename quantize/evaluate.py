"""How well a model predicts a text, and how far its predictions are from those of a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import ExecutionError, InvalidRequestError

Logits = NDArray[np.float32]
Tokens = NDArray[np.int32]
Doubles = NDArray[np.float64]
# Elements of float64 that are worked on at once, so that they stay in the cache of a core.
_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well one model predicts a text: ``nll`` is the mean of -ln p(token), over ``tokens``.

    The standard errors take the predictions as independent of each other.
    """

    tokens: int
    nll: float
    nll_standard_error: float

    @property
    def value(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)

    @property
    def standard_error(self) -> float:
        """Of ``value``, to first order."""
        return self.value * self.nll_standard_error

    def __str__(self) -> str:
        """``21.61 ± 0.64``."""
        error = self.standard_error
        return (
            f"{self.value:.4g} ± {error:.2g}" if error < 10 else f"{self.value:.0f} ± {error:.0f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "perplexity": self.value,
            "standard_error": self.standard_error,
            "nll": self.nll,
            "nll_standard_error": self.nll_standard_error,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A candidate against a reference on one text.

    ``log_ratio`` is the mean of ln p_reference(token) - ln p_candidate(token), the logarithm of
    the ratio of the perplexities. Its standard error is paired: that of the differences, token by
    token, which is far below those of the perplexities. KL divergences, of the reference from the
    candidate, are in nats; ``top1`` is the fraction of positions where both have the same likeliest
    token.
    """

    reference: Perplexity
    candidate: Perplexity
    log_ratio: float
    log_ratio_standard_error: float
    kl_mean: float
    kl_standard_error: float
    kl_p99: float
    top1: float

    @property
    def tokens(self) -> int:
        """Predictions compared."""
        return self.candidate.tokens

    @property
    def increase(self) -> float:
        """How much larger the candidate's perplexity is: 0.02 is 2 %."""
        return math.expm1(self.log_ratio)

    @property
    def increase_standard_error(self) -> float:
        """Paired, to first order."""
        return math.exp(self.log_ratio) * self.log_ratio_standard_error

    @property
    def change(self) -> str:
        """The increase as text: ``+0.21% ± 0.06%``."""
        return f"{self.increase:+.2%} ± {self.increase_standard_error:.2%}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "reference": self.reference.as_dict(),
            "candidate": self.candidate.as_dict(),
            "perplexity_increase": self.increase,
            "perplexity_increase_standard_error": self.increase_standard_error,
            "kl_mean": self.kl_mean,
            "kl_standard_error": self.kl_standard_error,
            "kl_p99": self.kl_p99,
            "top1_agreement": self.top1,
        }


def perplexity(logits: Iterable[Logits], windows: Sequence[Tokens]) -> Perplexity:
    """Of one model on ``windows`` of token ids, each on its own; its first token is not predicted.

    ``logits`` come in blocks float32 ``[rows, vocab]`` of any size, whose rows in order belong to
    the tokens of the windows. Raises ExecutionError for logits that are not finite and
    InvalidRequestError for windows that predict fewer than two tokens.
    """
    _check_windows(windows)
    reader, losses = _Reader(logits, "model"), []
    for targets, rows in _steps(windows, reader):
        losses.append(_losses(_log_softmax(rows[0], "model"), targets))
    return _perplexity(np.concatenate(losses))


def accuracy(
    reference: Iterable[Logits], candidate: Iterable[Logits], windows: Sequence[Tokens]
) -> Accuracy:
    """Compare two models on ``windows``; arguments and errors are those of ``perplexity``.

    Both are read side by side, so neither has to be in memory. Raises InvalidRequestError when
    their vocabularies differ.
    """
    _check_windows(windows)
    readers = _Reader(reference, "reference"), _Reader(candidate, "candidate")
    steps = _steps(windows, *readers)
    parts = [_compare(theirs, ours, targets) for targets, (theirs, ours) in steps]
    reference_nll, candidate_nll, kl, agree = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    log_ratio, log_ratio_error = _mean(candidate_nll - reference_nll)
    kl_mean, kl_error = _mean(kl)
    return Accuracy(
        reference=_perplexity(reference_nll),
        candidate=_perplexity(candidate_nll),
        log_ratio=log_ratio,
        log_ratio_standard_error=log_ratio_error,
        kl_mean=kl_mean,
        kl_standard_error=kl_error,
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(agree.mean()),
    )


class _Reader:
    """Blocks of rows, taken in other sizes than they come in."""

    def __init__(self, blocks: Iterable[Logits], whose: str) -> None:
        self._blocks = iter(blocks)
        self._block: Logits = np.empty((0, 0), np.float32)
        self._whose = whose

    def available(self) -> int:
        """Rows that can be had at once, at least one."""
        while not len(self._block):
            block = next(self._blocks, None)
            assert block is not None, f"the {self._whose} gave fewer rows than there are tokens"
            self._block = block
        return len(self._block)

    def width(self) -> int:
        return int(self._block.shape[1])

    def take(self, count: int) -> Logits:
        rows, self._block = self._block[:count], self._block[count:]
        return rows


def _steps(
    windows: Sequence[Tokens], *readers: _Reader
) -> Iterator[tuple[Tokens, tuple[Logits, ...]]]:
    """A few rows of every reader at a time, with the tokens that they predict."""
    for window in windows:
        start = 0
        while start < len(window):
            count = min(len(window) - start, *(reader.available() for reader in readers))
            widths = {reader.width() for reader in readers}
            if len(widths) > 1:
                raise InvalidRequestError(
                    f"the vocabularies have {' and '.join(map(str, sorted(widths)))} tokens, so "
                    "their predictions cannot be compared; give the checkpoint that the model was "
                    "made from as the reference"
                )
            count = min(count, max(1, _ELEMENTS // max(widths)))
            rows = tuple(reader.take(count) for reader in readers)
            targets = window[start + 1 : start + 1 + count]
            if len(targets):  # the last row of a window predicts nothing
                yield targets, tuple(block[: len(targets)] for block in rows)
            start += count


def _compare(
    reference: Logits, candidate: Logits, targets: Tokens
) -> tuple[Doubles, Doubles, Doubles, NDArray[np.bool_]]:
    """Per row: the losses of both, the divergence, and whether both have the same favourite."""
    ours, theirs = _log_softmax(candidate, "candidate"), _log_softmax(reference, "reference")
    return (
        _losses(theirs, targets),
        _losses(ours, targets),
        _divergence(theirs, ours),
        reference.argmax(axis=1) == candidate.argmax(axis=1),
    )


def _log_softmax(logits: Logits, whose: str) -> Doubles:
    """ln p of every token, float64 ``[rows, vocab]``."""
    peak = logits.max(axis=1, keepdims=True)
    if not np.isfinite(peak).all():
        raise ExecutionError(
            f"the logits of the {whose} hold {peak[~np.isfinite(peak)][0]} where a finite number "
            "was expected: its weights or scales are damaged, or overflow; make it again"
        )
    shifted = logits.astype(np.float64)
    shifted -= peak
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _losses(log_p: Doubles, targets: Tokens) -> Doubles:
    losses: Doubles = -log_p[np.arange(len(targets)), targets]
    return losses


def _divergence(reference: Doubles, candidate: Doubles) -> Doubles:
    """KL(reference || candidate) of every row, from ln p."""
    p = np.exp(reference)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where p is 0
        terms = np.where(p > 0, p * (reference - candidate), 0.0)
    kl: Doubles = terms.sum(axis=1)
    return np.maximum(kl, 0.0)  # rounding can leave a negative 1e-17


def _perplexity(losses: Doubles) -> Perplexity:
    return Perplexity(len(losses), *_mean(losses))


def _mean(values: Doubles) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _check_windows(windows: Sequence[Tokens]) -> None:
    predicted = sum(max(len(window) - 1, 0) for window in windows)
    if predicted < 2:
        raise InvalidRequestError(
            f"the text has {predicted} tokens to predict; at least 2 are needed, and a few "
            "thousand for a useful figure: give a longer text"
        )
