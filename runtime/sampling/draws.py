"""Draws of many rows in one call of the native kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins import native
from slipstream.plugins.draw_tokens import SPEC
from slipstream.runtime.engine.step import SamplingRow

Logits = NDArray[np.float32]

_FIELDS = {tensor.name: np.dtype(tensor.dtypes[0]) for tensor in (*SPEC.inputs[1:], *SPEC.outputs)}
# A thread is made and ended for each share, of at least as much work as that takes. To look for the
# largest logit takes a quarter of the time of a draw, or less.
_LOGITS_A_THREAD, _GREEDY_LOGITS_A_THREAD = 1 << 19, 1 << 21


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

    def at(self, seed: int, position: int) -> int:
        """The 53 bits of this ``seed`` (taken modulo 2**64) at this output position."""
        self._key[0] = seed % 2**64
        self._counter[0] = position
        self._generator.state = self._state
        return int(self._generator.random_raw()) >> 11


class Drawer:
    """Chooses the tokens of rows; used from one thread."""

    def __init__(self, vocab_size: int, num_threads: int) -> None:
        """``vocab_size`` is the width of the logits, which up to ``num_threads`` read."""
        self._vocab_size, self._threads = vocab_size, num_threads
        self._uniforms = UniformStream()
        self._arguments: Any = native.arguments_type(SPEC)(vocab=vocab_size)
        self._table: dict[str, NDArray[Any]] = {}
        self._reserve(1)

    def draw(
        self, logits: Logits, places: Sequence[int], rows: Sequence[SamplingRow]
    ) -> tuple[list[int], list[float]]:
        """A token for each of ``rows``, by the logits at its place in float32 ``[L, V]``, and the
        largest of these; -1 where that is not finite."""
        logits = np.ascontiguousarray(logits)
        count, params, table = len(rows), [row.params for row in rows], self._table
        if count > len(table["row"]):
            self._reserve(2 * count)
            table = self._table
        table["row"][:count] = places
        table["temperature"][:count] = [0 if p.greedy else p.temperature for p in params]
        table["top_k"][:count] = [p.top_k for p in params]
        table["top_p"][:count] = [p.top_p for p in params]
        table["min_p"][:count] = [p.min_p for p in params]
        table["uniform"][:count] = [
            0 if row.params.greedy else self._uniforms.at(row.seed, row.position) for row in rows
        ]
        arguments = self._arguments
        arguments.logits, arguments.rows, arguments.draws = logits.ctypes.data, len(logits), count
        greedy = sum(each.greedy for each in params)
        work = greedy / _GREEDY_LOGITS_A_THREAD + (count - greedy) / _LOGITS_A_THREAD
        shares = 1 + int(work * self._vocab_size)
        native.run(SPEC, arguments, threads=min(self._threads, shares))
        return table["token"][:count].tolist(), table["peak"][:count].tolist()

    def _reserve(self, count: int) -> None:
        self._table = {name: np.zeros(count, dtype) for name, dtype in _FIELDS.items()}
        for name, array in self._table.items():
            setattr(self._arguments, name, array.ctypes.data)
