"""Packs the plan of a step into the arrays that an executor takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from slipstream.builder.contract import STATES, CacheSpec
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.cache_groups import group_caches
from slipstream.runtime.engine.kv_cache import Allocation
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import Guessing, IntArray, PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.engine.window_group import WindowPages

_ON_DEVICE = -1


class BatchBuilder:
    """Turns plans into ``StepBatch``; keeps page tables, so a decode copies no page list."""

    def __init__(self, config: RuntimeConfig, caches: tuple[CacheSpec, ...]) -> None:
        groups = group_caches(caches)
        self._full = _PageTable(config, groups.full) if groups.full else None
        self._windows = [_PageTable(config, names) for names in groups.windows.values()]
        self._counter = np.arange(config.max_num_tokens, dtype=np.int32)
        self._page_size = config.page_size

    def build(
        self, plan: StepPlan, outputs: tuple[str, ...] = ()
    ) -> tuple[StepBatch, list[Sequence]]:
        """The packed step, and for each of its logits rows the sequence it belongs to.

        ``plan`` is the scheduler's latest; ``outputs`` are wanted of the graph beside what it needs
        of it.
        """
        rows = [sequence.row for sequence in plan.sequences]
        slots = np.array(rows, np.int32)
        counts = np.array(plan.counts, np.int32)
        context = np.array(plan.starts, np.int32) + counts
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        owners, positions = self._place(counts, context, query_start)
        pages: dict[str, PagedInputs] = {}
        if self._full is not None:
            pages = self._full.inputs(slots, plan.allocations, owners, positions)
        for index, table in enumerate(self._windows):
            held = [allocation.windows[index] for allocation in plan.allocations]
            pages |= table.inputs(slots, held, owners, positions)
        token_ids, begins = np.array(_tokens(plan), np.int32), query_start.tolist()
        wanted = _Wanted(plan, begins)
        _put_guesses(plan, begins, token_ids)
        batch = StepBatch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            context_len=context,
            logits_rows=np.array(wanted.rows, np.int32),
            sampling=wanted.sampling,
            slots=slots,
            sampling_slots=np.array(wanted.slots, np.int32),
            pages=pages,
            outputs=(*_outputs(plan), *outputs),
            drafts=plan.drafts,
            moves=plan.moves,
            transfers=plan.transfers.copies,
            guessing=None if plan.ahead is None else _guessing(plan, plan.ahead, self._page_size),
        )
        return batch, wanted.owners

    def _place(
        self, counts: IntArray, context: IntArray, query_start: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Of every token, which of the plan's sequences it belongs to and its position."""
        total = int(query_start[-1])
        if total == len(counts):  # decodes only
            return self._counter[:total], context - 1
        owners = self._counter[: len(counts)].repeat(counts)
        return owners, self._counter[:total] + (context - query_start[1:])[owners]


class _PageTable:
    """The pages of all running sequences in the caches of one group."""

    def __init__(self, config: RuntimeConfig, names: tuple[str, ...]) -> None:
        columns = -(-config.max_seq_len // config.page_size)
        self._names = names
        self._page_size = np.int32(config.page_size)
        self._table = np.zeros((config.max_batch_size, columns), np.int32)

    def inputs(
        self,
        rows: IntArray,
        held: Iterable[Allocation | WindowPages],
        owners: IntArray,
        positions: IntArray,
    ) -> dict[str, PagedInputs]:
        """The rows of the table, brought up to date, and the slot of every token; the caches of a
        group share them."""
        table = self._table[rows, : self._sync(rows.tolist(), held)]
        page, offset = np.divmod(positions, self._page_size)
        slots = table[owners, page] * self._page_size + offset
        return dict.fromkeys(self._names, PagedInputs(table, slots))

    def _sync(self, rows: Iterable[int], held: Iterable[Allocation | WindowPages]) -> int:
        """Bring rows of the table up to date and return the largest page count."""
        width = 0
        for row, each in zip(rows, held, strict=True):
            total = len(each.pages)
            if total > width:
                width = total
            if each.synced < total:
                self._table[row, each.synced : total] = each.pages[each.synced :]
                each.synced = total
        return width


class _Wanted:
    """The rows of a step whose logits are wanted: what for, whose, and where the token goes."""

    __slots__ = ("owners", "rows", "sampling", "slots")

    def __init__(self, plan: StepPlan, begins: list[int]) -> None:
        """``begins`` are the first token rows of the plan's sequences."""
        self.rows: list[int] = []
        self.sampling: list[SamplingRow] = []
        self.owners: list[Sequence] = []
        self.slots: list[int] = []
        chunks = zip(
            plan.sequences,
            plan.starts,
            plan.counts,
            plan.drafts,
            plan.outputs,
            begins,
            strict=False,  # there is one more of begins, the end
        )
        for sequence, start, count, drafts, output, begin in chunks:
            if sequence.prompt_logprobs is not None:
                for position in _unscored(sequence, start, start + count):
                    row = _new_row(sequence, sequence.tokens[position + 1])
                    row.position = position + 1
                    self._add(begin + position - start, row, sequence, -1)
            if sequence.pool is not None:
                row, wanted = _new_row(sequence, None), sequence.pool.wanted(start, start + count)
                row.position, row.pooled = wanted.start, True
                for position in wanted:
                    self._add(begin + position - start, row, sequence, -1)
            elif output >= 0:
                at = begin + count - 1 - drafts
                self._add_run(sequence, at, output, drafts)

    def _add_run(self, sequence: Sequence, at: int, output: int, drafts: int) -> None:
        """The rows from ``at`` on that sample the output from ``output`` on."""
        rows = sequence.sampling_rows
        while len(rows) <= drafts:
            rows.append(_new_row(sequence, None))
        for row in rows if len(rows) == drafts + 1 else rows[: drafts + 1]:
            row.position, row.drafts = output, ()  # the host may have guessed some the last time
            self.rows.append(at)
            self.sampling.append(row)
            self.owners.append(sequence)
            self.slots.append(sequence.row)
            output, at = output + 1, at + 1

    def _add(self, row: int, sampling: SamplingRow, owner: Sequence, slot: int) -> None:
        self.rows.append(row)
        self.sampling.append(sampling)
        self.owners.append(owner)
        self.slots.append(slot)


def _outputs(plan: StepPlan) -> tuple[str, ...]:
    return (STATES,) if any(sequence.pool for sequence in plan.sequences) else ()


def _guessing(plan: StepPlan, count: int, page_size: int) -> Guessing:
    """For a device that guesses after the step."""
    ends = zip(plan.sequences, plan.starts, plan.counts, plan.drafts, strict=True)
    following = [
        -1 if drafts or start + count >= len(sequence.tokens) else sequence.tokens[start + count]
        for sequence, start, count, drafts in ends
    ]
    held = [len(allocation.pages) * page_size for allocation in plan.allocations]
    return Guessing(count, np.array(following, np.int32), np.array(held, np.int32))


def _tokens(plan: StepPlan) -> list[int]:
    """The tokens of a step; only a decode has some that the host does not know."""
    tokens: list[int] = []
    for sequence, start, count in zip(plan.sequences, plan.starts, plan.counts, strict=True):
        known = sequence.tokens
        if count > 1:
            chunk = known[start : start + count]
            tokens += chunk
            tokens += [_ON_DEVICE] * (count - len(chunk))
        else:
            tokens.append(known[start] if start < len(known) else _ON_DEVICE)
    return tokens


def _put_guesses(plan: StepPlan, begins: list[int], token_ids: IntArray) -> None:
    """Write what the host guesses over the last tokens of its sequences, and into their rows."""
    for index, guess in plan.guesses.items():
        end = begins[index + 1]
        token_ids[end - len(guess) : end] = guess
        for size, row in enumerate(plan.sequences[index].sampling_rows[: len(guess) + 1]):
            row.drafts = guess[:size]


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
        constraint=sequence.constrained() if target is None else None,
    )
