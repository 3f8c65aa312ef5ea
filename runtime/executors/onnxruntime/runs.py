"""A step as runs of a graph: one for a graph over pages; for one over slots, where row b is the
sequence in the b-th slot that is bound, all decodes in one and each chunk of a prompt in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from slipstream.builder.contract import GraphSpec, Port, Source
from slipstream.runtime.engine.step import IntArray, StepBatch, reader_of

_HOST = (Source.LONGEST_CONTEXT,)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One run of a graph.

    ``values`` are its inputs by name. It is bound to pages or slots from ``first`` on, ``count`` of
    them, or to all where that is 0. Its output rows are those of the step in ``order``;
    ``rows`` picks them of a run that gives more. ``captured`` says that steps repeat its shape.
    """

    values: Mapping[str, IntArray]
    order: IntArray
    first: int = 0
    count: int = 0
    rows: IntArray | None = None
    captured: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of logits that the graph gives."""
        return len(self.values[Source.LOGITS_ROWS])


Runs = Callable[[StepBatch], list[Run]]


def whole_steps(spec: GraphSpec) -> Runs:
    """Every step in one run: its arrays are what the graph takes."""
    readers = {port.name: reader_of(port) for port in step_ports(spec)}

    def runs(batch: StepBatch) -> list[Run]:
        values = {name: read(batch) for name, read in readers.items()}
        return [Run(values, np.arange(len(batch.logits_rows), dtype=np.int32))]

    return runs


def step_ports(spec: GraphSpec) -> list[Port]:
    """The inputs that change with the step."""
    return [port for port in spec.inputs if port.source not in (Source.CACHE, Source.LAYER)]


def in_host_memory(port: Port) -> bool:
    """Whether an input is read on the host, whatever the device."""
    return port.source in _HOST


class SlotRuns:
    """Cuts steps for a graph over slots.

    Slots between two that decode, and after the last where ``buckets`` has the widths that are
    captured, are padded: they compute a token whose key and value lie after the last of their
    sequence, where its next token will be written.
    """

    def __init__(self, cache: str, num_slots: int, positions: int, *, captures: bool) -> None:
        """``cache`` is one whose page table gives the slots, ``positions`` the size of a slot."""
        self._cache, self._positions = cache, positions
        self._lengths = np.zeros(num_slots, np.int32)
        widths = [1 << bits for bits in range(num_slots.bit_length()) if 1 << bits < num_slots]
        self.buckets = [*widths, num_slots] if captures else []

    def __call__(self, batch: StepBatch) -> list[Run]:
        """The decodes, then the chunks."""
        slots = batch.pages[self._cache].page_table[:, 0]
        self._lengths[slots] = batch.context_len
        if len(batch.token_ids) == len(slots):  # each sequence has one, which is the usual step
            everyone = np.arange(len(slots), dtype=np.int32)
            return [self._decodes(batch, slots, everyone, batch.logits_rows)]
        counts = np.diff(batch.query_start)
        owners = np.searchsorted(batch.query_start, batch.logits_rows, side="right").astype(
            np.int32
        )
        owners -= 1
        decodes = np.flatnonzero(counts == 1).astype(np.int32)
        runs = [self._decodes(batch, slots, decodes, owners)] if len(decodes) else []
        chunks = np.flatnonzero(counts > 1)
        return runs + [self._chunk(batch, int(slots[s]), int(s), owners) for s in chunks]

    def padding(self, width: int) -> Run:
        """A run of the first ``width`` slots whose sequences, if any, stay as they are."""
        nobody = np.empty(0, np.int32)
        return self._padded(0, width, nobody, nobody, nobody)

    def _chunk(self, batch: StepBatch, slot: int, index: int, owners: IntArray) -> Run:
        """The tokens of one sequence."""
        begin, end = batch.query_start[index : index + 2]
        context = batch.context_len[index : index + 1]
        order = np.flatnonzero(owners == index).astype(np.int32)
        rows = batch.logits_rows[order] - begin
        positions = batch.positions[begin:end]
        values = _values(batch.token_ids[begin:end], positions, context, rows, context)
        return Run(values, order, slot, 1)

    def _decodes(
        self, batch: StepBatch, slots: IntArray, decodes: IntArray, owners: IntArray
    ) -> Run:
        """A token of each sequence that has one."""
        places = slots[decodes]
        low, high = int(places.min()), int(places.max()) + 1
        if self.buckets:
            low, high = 0, next(width for width in self.buckets if width >= high)
        order = np.flatnonzero(np.isin(owners, decodes)).astype(np.int32)
        rows = (slots[owners[order]] - low).astype(np.int32)
        tokens = batch.token_ids[batch.query_start[decodes]]
        run = self._padded(low, high, places, tokens, rows)
        return Run(run.values, order, low, high - low, run.rows, run.captured)

    def _padded(
        self, low: int, high: int, places: IntArray, tokens: IntArray, rows: IntArray
    ) -> Run:
        """Slots from ``low`` to ``high`` with ``tokens`` in some places."""
        token_ids = np.zeros(high - low, np.int32)
        token_ids[places - low] = tokens
        context = self._lengths[low:high] + 1
        context[places - low] -= 1
        # A captured run gives all rows, and is the same however long its sequences are.
        captured = bool(self.buckets)
        longest = np.array([self._positions], np.int32) if captured else context.max(keepdims=True)
        wanted = np.arange(high - low, dtype=np.int32) if captured else rows
        values = _values(token_ids, context - 1, context, wanted, longest)
        return Run(values, rows[:0], low, high - low, rows if captured else None, captured)


def _values(
    tokens: IntArray, positions: IntArray, context: IntArray, rows: IntArray, longest: IntArray
) -> Mapping[str, IntArray]:
    return {
        Source.TOKEN_IDS: tokens,
        Source.POSITIONS: positions,
        Source.CONTEXT_LEN: context,
        Source.LOGITS_ROWS: rows,
        Source.LONGEST_CONTEXT: longest,
    }
