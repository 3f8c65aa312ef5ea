"""From the states of a prompt's tokens to a vector, or to a score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import Pooling
from slipstream.errors import ExecutionError, InvalidRequestError

if TYPE_CHECKING:
    from slipstream.runtime.engine.sequence import Sequence
    from slipstream.runtime.engine.step import SamplingRow

_SMALLEST = 1e-12  # length of a vector that is brought to length 1


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How one prompt is pooled.

    dimensions              leading numbers of a vector that are kept (Matryoshka); None: all.
    normalize               bring a vector to length 1, after it was cut, or a score to between 0
                            and 1; None: as the model does.
    truncate_prompt_tokens  cut a longer prompt to so many of its first tokens; -1: to as many as
                            the engine takes. What the tokenizer puts around a text stays. None: a
                            prompt that is too long is refused.
    add_special_tokens      encode a text with what the tokenizer puts around it.
    prompt_name             which of the model's prompts stands before a text; None: the model's
                            default, if it has one.

    Raises ``InvalidRequestError`` for numbers out of range.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequestError(
                f"dimensions is {self.dimensions}; it must be at least 1", param="dimensions"
            )
        cut = self.truncate_prompt_tokens
        if cut is not None and (cut < -1 or cut == 0):
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {cut}; it must be at least 1, or -1 for as many as the "
                "engine takes",
                param="truncate_prompt_tokens",
            )


class Pool:
    """Takes the states of one prompt's tokens as steps compute them, in order.

    ``value`` is what they become, float32 ``[dimensions]`` or ``[1]``; None until all are there.
    """

    def __init__(self, pooling: Pooling, params: PoolingParams, length: int) -> None:
        self.mode = pooling.mode
        self.value: NDArray[np.float32] | None = None
        self._pooling, self._params, self._length = pooling, params, length
        self._next = self._first = length - 1 if pooling.mode == "last" else 0
        self._sum: NDArray[np.float64] | float = 0.0

    def wanted(self, start: int, stop: int) -> range:
        """The positions among these whose states are still to be taken."""
        return range(max(start, self._next), stop)

    def take(self, position: int, states: NDArray[np.float32]) -> bool:
        """Add the states ``[tokens, width]`` from a position on; True if the last is among them.
        Those that come again, because their sequence was preempted, are left out."""
        assert position <= self._next, "states come in order"
        new = states[self._next - position :]
        if not len(new):
            return False
        self._sum = self._sum + new.sum(axis=0, dtype=np.float64)
        self._next += len(new)
        if self._next < self._length:
            return False
        mean = np.asarray(self._sum / (self._length - self._first))
        self.value = finished(mean, self._pooling, self._params)
        return True


def finished(
    mean: NDArray[np.float64], pooling: Pooling, params: PoolingParams
) -> NDArray[np.float32]:
    """The vector, or the score ``[1]``, that pooled states become."""
    normalize = pooling.normalize if params.normalize is None else params.normalize
    if pooling.task == "score":
        odds = mean[:1] - mean[1:2].sum()
        return np.asarray(_sigmoid(odds) if normalize else odds, np.float32)
    vector = mean[: params.dimensions]
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), _SMALLEST)
    return vector.astype(np.float32)


def similarity(pooling: Pooling, a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """How alike two vectors are, by the measure of the model."""
    dot = float(np.dot(a.astype(np.float64), b))
    if pooling.similarity == "dot":
        return dot
    return dot / max(float(np.linalg.norm(a) * np.linalg.norm(b)), _SMALLEST)


def pooled(
    owners: Iterable[Sequence], rows: list[SamplingRow], states: NDArray[np.float32]
) -> Iterator[Sequence]:
    """Give every sequence the states of its rows, which follow each other, and tell those that have
    all."""
    begin = 0
    for sequence, its in groupby(owners):
        end = begin + sum(1 for _ in its)
        pool = sequence.pool
        assert pool is not None, "an engine that pools does nothing else"
        if not sequence.finish_reason and pool.take(rows[begin].position, states[begin:end]):
            yield sequence
        begin = end


def broken_states(
    rows: list[SamplingRow], states: NDArray[np.float32]
) -> dict[int, ExecutionError]:
    """What is wrong with the rows whose states cannot be pooled."""
    broken = np.flatnonzero(~np.isfinite(states).all(axis=1)).tolist()
    error = ExecutionError(
        "the state of a token is not finite; the engine or its numerics are broken: build it again"
    )
    return dict.fromkeys((row for row in broken if rows[row].pooled), error)


def no_text(pooling: Pooling) -> str:
    """Why an engine that pools generates nothing."""
    made = {"embed": "vectors of texts", "score": "scores of documents"}[pooling.task]
    return f"this engine makes {made} and has no logits (it was built for task {pooling.task})"


def require_text(pooling: Pooling | None) -> None:
    """Raise ``InvalidRequestError`` for an engine that generates nothing."""
    if pooling is not None:
        raise InvalidRequestError(
            f"{no_text(pooling)}; load an engine of the checkpoint that was built with --task "
            "generate"
        )


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))
