"""Packs the plan of a step into the arrays that an executor takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from slipstream.builder.contract import CacheSpec, paged
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.scheduler import StepPlan
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import IntArray, PagedInputs, SamplingRow, StepBatch

_ON_DEVICE = -1


class BatchBuilder:
    """Turns plans into ``StepBatch``; keeps a page table, so a decode copies no page list."""

    def __init__(self, config: RuntimeConfig, caches: Iterable[CacheSpec]) -> None:
        max_pages = -(-config.max_seq_len // config.page_size)
        self._page_size = config.page_size
        self._paged = [cache.name for cache in paged(caches)]
        self._table = np.zeros((config.max_batch_size, max_pages), np.int32)
        self._counter = np.arange(config.max_num_tokens, dtype=np.int32)

    def build(self, plan: StepPlan) -> tuple[StepBatch, list[Sequence]]:
        """The packed step, and for each of its logits rows the sequence it belongs to.

        ``plan`` is the scheduler's latest.
        """
        rows = [sequence.row for sequence in plan.sequences]
        slots = np.array(rows, np.int32)
        counts = np.array(plan.counts, np.int32)
        context = np.array(plan.starts, np.int32) + counts
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        page_table = self._table[slots, : self._sync(plan)]
        positions, slot_mapping = self._place(counts, context, query_start, page_table)
        wanted = _Wanted(plan, query_start.tolist())
        batch = StepBatch(
            token_ids=np.array(_tokens(plan), np.int32),
            positions=positions,
            query_start=query_start,
            context_len=context,
            logits_rows=np.array(wanted.rows, np.int32),
            sampling=wanted.sampling,
            slots=slots,
            sampling_slots=np.array(wanted.slots, np.int32),
            # Page n of a sequence is page n of every cache: one allocation serves them all.
            pages=dict.fromkeys(self._paged, PagedInputs(page_table, slot_mapping)),
        )
        return batch, wanted.owners

    def _sync(self, plan: StepPlan) -> int:
        """Bring the plan's rows of the page table up to date and return the largest page count."""
        width = 0
        for sequence, allocation in zip(plan.sequences, plan.allocations, strict=True):
            total = len(allocation.pages)
            if total > width:
                width = total
            if allocation.synced < total:
                pages = allocation.pages[allocation.synced :]
                self._table[sequence.row, allocation.synced : total] = pages
                allocation.synced = total
        return width

    def _place(
        self, counts: IntArray, context: IntArray, query_start: IntArray, page_table: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Position and slot of every token."""
        total = int(query_start[-1])
        if total == len(counts):  # decodes only
            owner = self._counter[:total]
            positions = context - 1
        else:
            owner = self._counter[: len(counts)].repeat(counts)
            positions = self._counter[:total] + (context - query_start[1:])[owner]
        page, offset = np.divmod(positions, np.int32(self._page_size))
        slots = page_table[owner, page] * np.int32(self._page_size) + offset
        return positions, slots


class _Wanted:
    """The rows of a step whose logits are wanted: what for, whose, and where the token goes."""

    __slots__ = ("owners", "rows", "sampling", "slots")

    def __init__(self, plan: StepPlan, begins: list[int]) -> None:
        """``begins`` are the first token rows of the plan's sequences."""
        self.rows: list[int] = []
        self.sampling: list[SamplingRow] = []
        self.owners: list[Sequence] = []
        self.slots: list[int] = []
        chunks = zip(plan.sequences, plan.starts, plan.counts, plan.outputs, begins, strict=False)
        for sequence, start, count, output, begin in chunks:
            if sequence.prompt_logprobs is not None:
                for position in _unscored(sequence, start, start + count):
                    target = sequence.tokens[position + 1]
                    self._add(begin + position - start, _new_row(sequence, target), sequence, -1)
            if output >= 0:
                row = sequence.sampling_row
                if row is None:
                    row = sequence.sampling_row = _new_row(sequence, None)
                row.position = output
                self._add(begin + count - 1, row, sequence, sequence.row)

    def _add(self, row: int, sampling: SamplingRow, owner: Sequence, slot: int) -> None:
        self.rows.append(row)
        self.sampling.append(sampling)
        self.owners.append(owner)
        self.slots.append(slot)


def _tokens(plan: StepPlan) -> list[int]:
    """The tokens of a step; only the single token of a decode can be unknown."""
    tokens: list[int] = []
    for sequence, start, count in zip(plan.sequences, plan.starts, plan.counts, strict=True):
        known = sequence.tokens
        if count > 1:
            tokens += known[start : start + count]
        else:
            tokens.append(known[start] if start < len(known) else _ON_DEVICE)
    return tokens


def _unscored(sequence: Sequence, start: int, end: int) -> range:
    """The positions from ``start`` to ``end`` that are to score the prompt token after them."""
    assert sequence.prompt_logprobs is not None
    first = max(start, len(sequence.prompt_logprobs) - 1)
    return range(first, min(end, sequence.prompt_len - 1))


def _new_row(sequence: Sequence, target: int | None) -> SamplingRow:
    request = sequence.request
    return SamplingRow(
        params=request.params,
        prompt=request.prompt_token_ids,
        output=sequence.output,
        seed=sequence.seed,
        eos_token_ids=sequence.eos_token_ids,
        target=target,
    )
