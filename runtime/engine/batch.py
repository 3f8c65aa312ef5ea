"""Packs the plan of a step into the arrays that an executor takes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection
from struct import Struct

import numpy as np

from slipstream.builder.contract import STATES, TARGET_GRAPH, CacheSpec
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.cache_groups import group_caches
from slipstream.runtime.engine.kv_cache import Allocation
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import Guessing, IntArray, PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.engine.window_group import WindowPages

_ROW = operator.attrgetter("row")
_ON_DEVICE = -1


class BatchBuilder:
    """Turns plans into ``StepBatch``. Most steps decode what the step before did: page tables are
    kept, so a decode copies no page list, and so are arrays that are as they were, which nobody may
    write to; others are written anew in place while steps have as many tokens of each sequence."""

    def __init__(self, config: RuntimeConfig, caches: tuple[CacheSpec, ...]) -> None:
        groups = group_caches(caches)
        self._tables = [_PageTable(config, groups.full)] if groups.full else []
        for index, names in enumerate(groups.windows.values()):
            self._tables.append(_PageTable(config, names, window=index))
        self._page_size = config.page_size
        self._numbers = _Numbers([], len(self._tables))
        self._slots, self._sampling_slots, self._logits_rows = _Kept(), _Kept(), _Kept()

    def build(
        self, plan: StepPlan, outputs: tuple[str, ...] = ()
    ) -> tuple[StepBatch, list[Sequence], list[int]]:
        """The packed step, and for each of its logits rows the sequence it belongs to and its
        position, which changes with the next step.

        ``plan`` is the scheduler's latest; ``outputs`` are wanted of the graph beside what it needs
        of it.
        """
        numbers = self._numbers
        if numbers.counts != plan.counts:
            numbers = self._numbers = _Numbers(plan.counts, len(self._tables))
        rows = list(map(_ROW, plan.sequences))
        slots = self._slots.of(rows)
        written = _tokens(plan)
        if numbers.owners is None:
            written += plan.starts
        else:
            numbers.put_positions(plan.starts)
        pages: dict[str, PagedInputs] = {}
        for index, table in enumerate(self._tables):
            inputs, places = table.inputs(rows, slots, plan, numbers.slot_mappings[index])
            if numbers.owners is None:
                written += places
            else:
                numbers.put_slots(inputs, self._page_size)
            for name in table.names:
                pages[name] = inputs
        numbers.write(written)
        wanted = _Wanted(plan, numbers.begins)
        if plan.guesses:
            _put_guesses(plan, numbers.begins, numbers.token_ids)
        batch = StepBatch(  # by place: by name it takes twice as long
            numbers.token_ids,
            numbers.positions,
            numbers.query_start,
            numbers.context_len,
            self._logits_rows.of(wanted.rows),
            wanted.sampling,
            slots,
            self._sampling_slots.of(wanted.slots),
            pages,
            TARGET_GRAPH,
            wanted.outputs + outputs,
            plan.drafts,
            plan.moves,
            plan.transfers.copies,
        )
        if plan.ahead is not None:
            batch.guessing = _guessing(plan, plan.ahead, self._page_size)
        return batch, wanted.owners, wanted.positions


class _Kept:
    """The array of a list that most steps have as the step before had it."""

    __slots__ = ("_array", "_numbers")

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._array = _read_only(np.zeros(0, np.int32))

    def of(self, numbers: list[int]) -> IntArray:
        """int32, the same array as the last if the numbers are. The list must stay as it is."""
        if numbers != self._numbers:
            self._numbers, self._array = numbers, _read_only(np.array(numbers, np.int32))
        return self._array


class _Numbers:
    """What changes from step to step while each of the sequences has as many tokens: ``token_ids``,
    ``context_len``, ``positions`` and the ``slot_mappings`` of some page tables are parts of one
    array, which is written anew for every step. ``begins`` and ``query_start`` are where sequences
    begin, and the end; ``owners`` says whose each token is, None: each sequence has one."""

    __slots__ = (
        "_memory",
        "_pack",
        "begins",
        "context_len",
        "counts",
        "owners",
        "positions",
        "query_start",
        "slot_mappings",
        "token_ids",
    )

    def __init__(self, counts: list[int], num_tables: int) -> None:
        self.counts, self.begins = counts, [0, *itertools.accumulate(counts)]
        self.query_start = _read_only(np.array(self.begins, np.int32))
        tokens, sequences = self.begins[-1], len(counts)
        listed = tokens + sequences  # of the array, from lists
        whole = np.zeros(listed + (1 + num_tables) * tokens, np.int32)
        self.token_ids, self.context_len = whole[:tokens], whole[tokens:listed]
        self.positions, *self.slot_mappings = whole[listed:].reshape(1 + num_tables, tokens)
        self.owners: IntArray | None = None
        if tokens == sequences:
            listed = len(whole)
        else:
            self.owners = np.arange(sequences, dtype=np.int32).repeat(counts)
        self._memory, self._pack = whole.data, Struct(f"{listed}i").pack_into

    def write(self, numbers: list[int]) -> None:
        """Make these the tokens, and where sequences end; and the rest, where each has one token:
        a list is packed by less code than NumPy walks through."""
        self._pack(self._memory, 0, *numbers)

    def put_positions(self, starts: list[int]) -> None:
        """Write those of sequences that go on from ``starts``."""
        assert self.owners is not None, "else there is one token of each"
        firsts = np.array(starts, np.int32) - self.query_start[:-1]
        np.add(firsts[self.owners], np.arange(len(self.owners), dtype=np.int32), out=self.positions)

    def put_slots(self, inputs: PagedInputs, page_size: int) -> None:
        """Write where the tokens at these positions lie into the slot mapping."""
        page, offset = np.divmod(self.positions, np.int32(page_size))
        mapping = inputs.slot_mapping
        np.multiply(inputs.page_table[self.owners, page], page_size, out=mapping)
        mapping += offset


class _PageTable:
    """The pages of all running sequences in the caches of one group."""

    def __init__(
        self, config: RuntimeConfig, names: tuple[str, ...], window: int | None = None
    ) -> None:
        """``window`` is which of an allocation's windows has them; None: those of all tokens."""
        columns = -(-config.max_seq_len // config.page_size)
        self.names, self._window = names, window
        self._page_size = config.page_size
        self._table = np.zeros((config.max_batch_size, columns), np.int32)
        # What the last step had of it, of which rows, and how wide.
        nothing = _read_only(self._table[0, :0].copy())
        self._inputs = PagedInputs(nothing, nothing)
        self._rows: IntArray | None = None
        self._width = 0

    def inputs(
        self, rows: list[int], slots: IntArray, plan: StepPlan, mapping: IntArray
    ) -> tuple[PagedInputs, list[int]]:
        """The ``rows`` of the table, which are ``slots``, too, brought up to date, beside the
        ``mapping``, and the slots of the first tokens of sequences, which are to be in that where
        those are all; the caches of a group share them."""
        size, width, changed = self._page_size, 0, False
        places: list[int] = []
        for index, each in enumerate(self._held(plan)):
            start, pages = plan.starts[index], each.pages
            total = len(pages)
            if total > width:
                width = total
            if each.synced < total:
                self._table[rows[index], each.synced : total] = pages[each.synced :]
                each.synced, changed = total, True
            places.append(pages[start // size] * size + start % size)
        inputs = self._inputs
        if changed or self._rows is not slots or self._width != width:
            self._rows, self._width = slots, width
            table = _read_only(self._table[slots, :width])
            inputs = self._inputs = PagedInputs(table, mapping)
        elif inputs.slot_mapping is not mapping:
            inputs = self._inputs = PagedInputs(inputs.page_table, mapping)
        return inputs, places

    def _held(self, plan: StepPlan) -> Collection[Allocation | WindowPages]:
        """What the sequences of a plan have here."""
        index = self._window
        if index is None:
            return plan.allocations
        return [allocation.windows[index] for allocation in plan.allocations]


class _Wanted:
    """The rows of a step whose logits are wanted: what for, whose, and where the token goes."""

    __slots__ = ("outputs", "owners", "positions", "rows", "sampling", "slots")

    def __init__(self, plan: StepPlan, begins: list[int]) -> None:
        """``begins`` are the first token rows of the plan's sequences."""
        self.rows: list[int] = []
        self.sampling: list[SamplingRow] = []
        self.owners: list[Sequence] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.outputs: tuple[str, ...] = ()  # of the graph, beside its logits
        for index, sequence in enumerate(plan.sequences):
            start, count, begin = plan.starts[index], plan.counts[index], begins[index]
            if sequence.prompt_logprobs is not None:
                for position in _unscored(sequence, start, start + count):
                    row = _new_row(sequence, sequence.tokens[position + 1])
                    row.position = position + 1
                    self._add(begin + position - start, row, sequence, -1)
            if sequence.pool is not None:
                self.outputs = (STATES,)
                row, wanted = _new_row(sequence, None), sequence.pool.wanted(start, start + count)
                row.position, row.pooled = wanted.start, True
                for position in wanted:
                    self._add(begin + position - start, row, sequence, -1)
            elif (output := plan.outputs[index]) >= 0:
                drafts = plan.drafts[index]
                self._add_run(sequence, begin + count - 1 - drafts, output, drafts)

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
            self.positions.append(output)
            self.slots.append(sequence.row)
            output, at = output + 1, at + 1

    def _add(self, row: int, sampling: SamplingRow, owner: Sequence, slot: int) -> None:
        self.rows.append(row)
        self.sampling.append(sampling)
        self.owners.append(owner)
        self.positions.append(sampling.position)
        self.slots.append(slot)


def _read_only(numbers: IntArray) -> IntArray:
    numbers.flags.writeable = False
    return numbers


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
    """The tokens of a step, and then where each sequence ends in it; only a decode has tokens that
    the host does not know."""
    tokens: list[int] = []
    ends: list[int] = []
    for index, sequence in enumerate(plan.sequences):
        known, start, count = sequence.tokens, plan.starts[index], plan.counts[index]
        end = start + count
        if count > 1:
            chunk = known[start:end]
            tokens += chunk
            tokens += [_ON_DEVICE] * (count - len(chunk))
        else:
            tokens.append(known[start] if start < len(known) else _ON_DEVICE)
        ends.append(end)
    return tokens + ends


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
