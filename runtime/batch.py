"""Packs the plan of a step into the arrays that an executor takes."""

from __future__ import annotations

import numpy as np

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.scheduler import StepPlan
from slipstream.runtime.sequence import Sequence
from slipstream.runtime.step import IntArray, SamplingRow, StepBatch


class BatchBuilder:
    """Turns plans into ``StepBatch``; keeps a page table, so a decode copies no page list."""

    def __init__(self, config: RuntimeConfig) -> None:
        max_pages = -(-config.max_seq_len // config.page_size)
        self._page_size = config.page_size
        self._table = np.zeros((config.max_batch_size, max_pages), np.int32)
        self._counter = np.arange(config.max_num_tokens, dtype=np.int32)

    def build(self, plan: StepPlan) -> tuple[StepBatch, list[Sequence]]:
        """The packed step, and for each of its logits rows the sequence it belongs to."""
        tokens: list[int] = []
        logits_rows: list[int] = []
        sampling: list[SamplingRow] = []
        owners: list[Sequence] = []
        width = 0
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            start = sequence.num_computed
            chunk = sequence.tokens[start : start + count]
            width = max(width, self._sync(sequence))
            for offset, target in _wanted_rows(sequence, count):
                logits_rows.append(len(tokens) + offset)
                sampling.append(_sampling_row(sequence, target))
                owners.append(sequence)
            tokens += chunk

        context = np.array([s.num_computed for s in plan.sequences], np.int32)
        counts = np.array(plan.counts, np.int32)
        context += counts
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        rows = [sequence.row for sequence in plan.sequences]
        page_table = self._table[:, :width].take(rows, axis=0)
        positions, slots = self._place(counts, context, query_start, page_table)
        batch = StepBatch(
            token_ids=np.array(tokens, np.int32),
            positions=positions,
            query_start=query_start,
            context_len=context,
            page_table=page_table,
            slot_mapping=slots,
            logits_rows=np.array(logits_rows, np.int32),
            sampling=sampling,
        )
        return batch, owners

    def _sync(self, sequence: Sequence) -> int:
        """Bring the sequence's row of the page table up to date and return its page count."""
        allocation = sequence.allocation
        assert allocation is not None
        total = len(allocation.pages)
        if allocation.synced < total:
            pages = allocation.pages[allocation.synced :]
            self._table[sequence.row, allocation.synced : total] = pages
            allocation.synced = total
        return total

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


def _wanted_rows(sequence: Sequence, count: int) -> list[tuple[int, int | None]]:
    """Rows of a chunk whose logits are wanted, and the prompt token that each is to score."""
    start = sequence.num_computed
    wanted: list[tuple[int, int | None]] = []
    if sequence.scores_prompt:
        assert sequence.prompt_logprobs is not None
        first = max(start, len(sequence.prompt_logprobs) - 1)
        last = min(start + count, sequence.prompt_len - 1)
        wanted += [(row - start, sequence.tokens[row + 1]) for row in range(first, last)]
    if start + count == len(sequence.tokens):
        wanted.append((count - 1, None))
    return wanted


def _sampling_row(sequence: Sequence, target: int | None) -> SamplingRow:
    request = sequence.request
    return SamplingRow(
        params=request.params,
        prompt=request.prompt_token_ids,
        output=sequence.output,
        seed=sequence.seed,
        eos_token_ids=sequence.eos_token_ids,
        target=target,
    )
