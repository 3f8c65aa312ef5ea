"""Which tokens may come next, as bits, for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slipstream.cores import usable_cores
from slipstream.runtime.structured.grammar import Constraint

if TYPE_CHECKING:
    from llguidance import LLExecutor

_MOST_THREADS = 8
# A row takes some 10 µs. To wake a thread takes longer.
_FEW = 4

Bits = NDArray[np.int32]


class MaskFiller:
    """Fills bitmasks without the interpreter, in threads of its own where that pays."""

    def __init__(self, vocab_size: int, num_threads: int | None = None) -> None:
        """``vocab_size`` is the width of the logits; ``num_threads`` None takes the cores that this
        process may use, up to 8."""
        self.words = -(-vocab_size // 32)
        self._threads = min(num_threads or usable_cores(), _MOST_THREADS)
        self._executor: LLExecutor | None = None

    def fill(self, constraints: Sequence[Constraint], masks: Bits) -> None:
        """Write the mask of each into its row of ``masks``, int32 ``[>= N, words]``: bit ``id %
        32`` of word ``id // 32`` is set for a token that may come next.

        One that has failed gets the end-of-sequence tokens; its next ``take`` says why.
        """
        assert masks.shape[1] == self.words and masks.flags.c_contiguous, masks.shape
        size, place = 4 * self.words, masks.ctypes.data
        if len(constraints) <= _FEW or self._threads <= 2:
            for index, constraint in enumerate(constraints):
                constraint.matcher.unsafe_compute_mask_ptr(place + index * size, size)
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._threads)
        matchers = [(each.matcher, index) for index, each in enumerate(constraints)]
        self._executor.unsafe_compute_mask_ptr(matchers, place, size, len(masks))


def allowed_tokens(mask: Bits, vocab_size: int) -> NDArray[np.bool_]:
    """A row's bits as flags, one a token."""
    bits = np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)
