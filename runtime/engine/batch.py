"""Packs the plan of a step into the arrays that an executor takes."""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Collection

import numpy as np

from slipstream.builder.contract import STATES, CacheSpec
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.cache_groups import group_caches
from slipstream.runtime.engine.kv_cache import Allocation
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.step import Guessing, IntArray, PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.engine.window_group import WindowPages

_ROW = operator.attrgetter("row")
_ON_DEVICE = -1
_FEW = 64  # tokens that are looked at one by one in less time than NumPy's calls take


class BatchBuilder:
    """Turns plans into ``StepBatch``. Most steps decode what the step before did: page tables are
    kept, so a decode copies no page list, and so are arrays that are as they were, which nobody may
    write to."""

    def __init__(self, config: RuntimeConfig, caches: tuple[CacheSpec, ...]) -> None:
        groups = group_caches(caches)
        self._full = _PageTable(config, groups.full) if groups.full else None
        self._windows = [_PageTable(config, names) for names in groups.windows.values()]
        self._counter = _read_only(np.arange(config.max_num_tokens + 1, dtype=np.int32))
        self._page_size = config.page_size
        self._runs = _Runs([], self._counter)
        self._slots, self._sampling_slots, self._logits_rows = _Kept(), _Kept(), _Kept()

    def build(
        self, plan: StepPlan, outputs: tuple[str, ...] = ()
    ) -> tuple[StepBatch, list[Sequence], list[int]]:
        """The packed step, and for each of its logits rows the sequence it belongs to and its
        position, which changes with the next step.

        ``plan`` is the scheduler's latest; ``outputs`` are wanted of the graph beside what it needs
        of it.
        """
        runs = self._runs
        if runs.counts != plan.counts:
            runs = self._runs = _Runs(plan.counts, self._counter)
        rows = list(map(_ROW, plan.sequences))
        slots = self._slots.of(rows)
        token_ids, starts, ends = _columns(plan)
        positions = runs.positions(starts)
        pages: dict[str, PagedInputs] = {}
        if self._full is not None:
            pages = self._full.inputs(rows, slots, plan.allocations, runs, plan.starts, positions)
        for index, table in enumerate(self._windows):
            held = [allocation.windows[index] for allocation in plan.allocations]
            pages |= table.inputs(rows, slots, held, runs, plan.starts, positions)
        wanted = _Wanted(plan, runs.begins)
        if plan.guesses:
            _put_guesses(plan, runs.begins, token_ids)
        batch = StepBatch(
            token_ids=token_ids,
            positions=positions,
            query_start=runs.query_start,
            context_len=ends,
            logits_rows=self._logits_rows.of(wanted.rows),
            sampling=wanted.sampling,
            slots=slots,
            sampling_slots=self._sampling_slots.of(wanted.slots),
            pages=pages,
            outputs=wanted.outputs + outputs,
            drafts=plan.drafts,
            moves=plan.moves,
            transfers=plan.transfers.copies,
            guessing=None if plan.ahead is None else _guessing(plan, plan.ahead, self._page_size),
        )
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


class _Runs:
    """How the tokens of sequences lie in a step, of which each has ``counts`` of them.

    ``query_start`` and ``begins`` are where they begin, and the end; ``owners`` is of every token
    which of the sequences it belongs to. Where they ``are_few`` each has one.
    """

    __slots__ = ("_places", "are_few", "begins", "counts", "owners", "query_start")

    def __init__(self, counts: list[int], counter: IntArray) -> None:
        """``counter`` counts from 0 to the most tokens of a step."""
        self.counts, self.begins = counts, [0, *itertools.accumulate(counts)]
        total, size = self.begins[-1], len(counts)
        self.query_start, self.owners = counter[: size + 1], counter[:size]
        self.are_few = total == size <= _FEW
        self._places: IntArray | None = None  # of every token in its run; None: all are the first
        if total != size:
            self.query_start = _read_only(np.array(self.begins, np.int32))
            self.owners = _read_only(self.owners.repeat(counts))
            self._places = counter[:total] - self.query_start[self.owners]

    def positions(self, starts: IntArray) -> IntArray:
        """Of every token, where sequences go on from ``starts``."""
        return starts if self._places is None else starts[self.owners] + self._places


class _PageTable:
    """The pages of all running sequences in the caches of one group."""

    def __init__(self, config: RuntimeConfig, names: tuple[str, ...]) -> None:
        columns = -(-config.max_seq_len // config.page_size)
        self._names = names
        self._page_size = config.page_size
        self._table = np.zeros((config.max_batch_size, columns), np.int32)
        # What the last step had of it, and of which rows.
        self._shown = _read_only(self._table[:0].copy())
        self._rows: IntArray | None = None

    def inputs(
        self,
        rows: list[int],
        slots: IntArray,
        held: Collection[Allocation | WindowPages],
        runs: _Runs,
        starts: list[int],
        positions: IntArray,
    ) -> dict[str, PagedInputs]:
        """The ``rows`` of the table, which are ``slots``, too, brought up to date, and the slot of
        every token; the caches of a group share them."""
        width, changed = self._sync(rows, held)
        table = self._shown
        if changed or self._rows is not slots or table.shape[1] != width:
            table = self._shown = _read_only(self._table[slots, :width])
            self._rows = slots
        size = self._page_size
        if runs.are_few:
            places = zip(held, starts, strict=True)
            mapping = _int32([e.pages[at // size] * size + at % size for e, at in places])
        else:
            page, offset = np.divmod(positions, np.int32(size))
            mapping = table[runs.owners, page]
            mapping *= np.int32(size)
            mapping += offset
        return dict.fromkeys(self._names, PagedInputs(table, mapping))

    def _sync(
        self, rows: list[int], held: Collection[Allocation | WindowPages]
    ) -> tuple[int, bool]:
        """Bring rows up to date; the largest page count, and whether a row has changed."""
        width, changed = 0, False
        for row, each in zip(rows, held, strict=True):
            total = len(each.pages)
            if total > width:
                width = total
            if each.synced < total:
                self._table[row, each.synced : total] = each.pages[each.synced :]
                each.synced, changed = total, True
        return width, changed


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
                self.outputs = (STATES,)
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
            self.positions.append(output)
            self.slots.append(sequence.row)
            output, at = output + 1, at + 1

    def _add(self, row: int, sampling: SamplingRow, owner: Sequence, slot: int) -> None:
        self.rows.append(row)
        self.sampling.append(sampling)
        self.owners.append(owner)
        self.positions.append(sampling.position)
        self.slots.append(slot)


def _int32(numbers: list[int]) -> IntArray:
    """An array of some numbers, in less code than NumPy walks through to find out what they are."""
    return np.frombuffer(array("i", numbers), np.int32)


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


def _columns(plan: StepPlan) -> tuple[IntArray, IntArray, IntArray]:
    """The tokens of a step, and where those of each sequence begin and end in it; int32."""
    ends = list(map(operator.add, plan.starts, plan.counts))
    lists = _tokens(plan), plan.starts, ends
    if len(lists[0]) == len(ends):  # one array costs less than three
        size, whole = len(ends), _int32([*lists[0], *lists[1], *lists[2]])
        tokens, starts, ended = whole[:size], whole[size : 2 * size], whole[2 * size :]
    else:
        tokens, starts, ended = map(_int32, lists)
    return tokens, starts, ended


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
