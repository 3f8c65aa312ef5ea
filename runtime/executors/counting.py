"""A model without weights: the next token is a closed form, and the caches hold the tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import (
    KV,
    LOGITS,
    TARGET_GRAPH,
    CacheArray,
    CacheSpec,
    GraphSpec,
    Output,
    ports_of,
)
from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import (
    REJECTED,
    IntArray,
    PagedInputs,
    SamplingRow,
    StepBatch,
    StepResult,
    TokenLogprobs,
    reject,
)
from slipstream.runtime.executors.counting_caches import (
    GARBAGE,
    CountingCache,
    CountingHost,
    HashedState,
    PagedTokens,
)
from slipstream.runtime.structured.masks import MaskFiller, allowed_tokens


def counting_contract(
    page_size: int, vocab_size: int
) -> tuple[dict[str, GraphSpec], tuple[CacheSpec, ...]]:
    """One graph and one paged cache."""
    array = CacheArray(KV, "int32", (page_size,))
    caches = (CacheSpec(KV, "paged", (0,), (array,), page_size),)
    logits = Output(LOGITS, "float32", ("L", vocab_size))
    return {TARGET_GRAPH: GraphSpec("", tuple(ports_of(caches)), (logits,))}, caches


def next_token(token: int, vocab_size: int, seed: int = 0) -> int:
    """What follows ``token``; a sampled (not greedy) sequence strides by 1 + ``seed``."""
    return (token + 1 + seed) % vocab_size


def run_length(token: int, position: int, drafts: int) -> int:
    """How many tokens a step gives that computes ``token`` at ``position`` and guesses ``drafts``
    tokens after it."""
    return 1 + (token + position) % (drafts + 1)


def logprob_of(token: int) -> float:
    """The made-up log probability of ``token``, exact in binary."""
    return -(1 + token % 8) / 8


class CountingExecutor(CountingHost):
    """Runs steps of the counting model and verifies that they were scheduled and paged correctly.

    Every step writes its token ids to the caches of its graph and reads each whole context back;
    anything but the tokens of the sequence is an ``AssertionError``. Further outputs hold the token
    of each row. Set ``fail_next`` to make the next step fail (and leave garbage in its slots);
    ``delay`` is seconds that the device takes for a step, beside the host, ``steps`` counts them,
    and ``closed`` tells whether ``shutdown`` was called.

    It guesses ``draft_tokens`` tokens at a time, of which ``run_length`` tells how many are right.
    A row that would give ``broken_token`` fails. A row with a form gives the next
    token on that the form allows, or the least one of all that it does.

    With ``runs_ahead`` it takes two steps at a time and puts in the tokens that the host does not
    know. It does so in ``submit``, as a device that is infinitely fast, but keeps the answer until
    it is asked for.
    """

    def __init__(
        self,
        num_pages: int,
        graphs: Mapping[str, GraphSpec],
        caches: Sequence[CacheSpec],
        *,
        delay: float = 0.0,
        runs_ahead: bool = False,
        draft_tokens: int = 0,
        max_drafts: int = 7,
    ) -> None:
        """``graphs`` and ``caches`` are an engine's; every graph reads a paged cache without a
        window."""
        self.delay = delay
        self.fail_next = False
        self.broken_token: int | None = None
        self.steps = 0
        self.closed = False
        self._runs_ahead = runs_ahead
        self._draft_tokens = draft_tokens
        self._max_drafts = max_drafts
        self._num_pages = num_pages
        self._graphs = graphs
        self._vocab_size = _vocab_size(graphs[TARGET_GRAPH])
        self._filler = MaskFiller(self._vocab_size)
        self._caches = _caches_of_graphs(graphs, caches, num_pages)
        super().__init__(self._caches.values())
        self._page_sizes = {cache.name: cache.page_size for cache in caches}
        self._free_at = 0.0  # when the device has done what it was given
        # The last token of what the step before sampled and the length of the run, by slot.
        self._last_runs: dict[int, tuple[int, int]] = {}
        self._on_their_way: deque[CountingStep] = deque()

    @property
    def runs_ahead(self) -> bool:
        """As given at construction."""
        return self._runs_ahead

    @property
    def draft_tokens(self) -> int:
        """As given at construction."""
        return self._draft_tokens

    @property
    def max_drafts(self) -> int:
        """As given at construction; none where it guesses itself."""
        return 0 if self._draft_tokens else self._max_drafts

    def reserve_kv(self, num_bytes: int | None) -> int:
        """The number of pages given at construction; a page has no bytes."""
        return self._num_pages

    def submit(self, batch: StepBatch) -> CountingStep:
        """Run a step whose result is handed over when it is wanted."""
        failing, self.fail_next = self.fail_next, False
        self._check_order()
        self.steps += 1
        # What follows a step that fails works on garbage until the host has heard of it.
        excused = any(step.failed for step in self._on_their_way)
        result = None
        if failing:
            self._spoil(batch)
        else:
            result = self._run(batch, excused)
        step = CountingStep(self, result, batch)
        step.ready = max(time.perf_counter(), self._free_at) + self.delay
        self._free_at = step.ready
        self._on_their_way.append(step)
        return step

    def constrain(self, step: CountingStep) -> None:
        """Hold the rows of ``step`` to their forms."""
        batch, result = step.batch, step.landed
        held = [(i, row.constraint) for i, row in enumerate(step.rows) if row.constraint]
        if not held or result is None:
            return
        masks = np.empty((len(held), self._filler.words), np.int32)
        self._filler.fill([form for i, _ in held if (form := step.rows[i].form)], masks)
        for (index, _), mask in zip(held, masks, strict=True):
            token = result.token_ids[index]
            if token != GARBAGE and not mask[token >> 5] >> (token & 31) & 1:
                allowed = np.flatnonzero(allowed_tokens(mask, self._vocab_size))
                token = int(allowed[np.searchsorted(allowed, token) % len(allowed)])
            result.token_ids[index] = token
            result.logprobs[index] = _logprobs(token, step.rows[index])
            self._last_runs[int(batch.sampling_slots[index])] = (token, 1)

    def check_head(self, step: CountingStep) -> None:
        """Verify that the host knows what edits of the rows of ``step`` need."""
        if any(row.target is None and row.params.needs_output for row in step.rows):
            assert self._on_their_way[0] is step, "the host must know the output before this step"

    def land(self, step: CountingStep) -> None:
        """Note that a step's result is handed over."""
        assert self._on_their_way.popleft() is step, "results are taken out of order"
        if self.delay:
            time.sleep(max(0.0, step.ready - time.perf_counter()))

    def shutdown(self) -> None:
        """Only remembered: there is nothing to free."""
        self.closed = True

    def _check_order(self) -> None:
        others = self._on_their_way
        assert len(others) <= self._runs_ahead, "too many steps on their way"
        assert all(step.sampled for step in others), "the step before was never sampled"

    def _spoil(self, batch: StepBatch) -> None:
        """Leave garbage wherever a step would have written."""
        batch, _ = self._placed(batch)
        whole, others = self._caches[batch.graph]
        for cache in (whole, *others):
            cache.spoil(batch)
        self._last_runs = dict.fromkeys(batch.sampling_slots.tolist(), (GARBAGE, 1))

    def _run(self, planned: StepBatch, excused: bool) -> StepResult:
        """Compute a step; only what ``excused`` sequences read may be garbage."""
        assert len(np.unique(planned.slots)) == len(planned.slots), "two sequences in a slot"
        batch, surplus = self._placed(planned)
        self.transfer(planned.transfers)
        contexts = self._contexts(batch, batch.token_ids, excused)
        result = StepResult([], [], self._outputs(batch, batch.token_ids))
        last_runs: dict[int, tuple[int, int]] = {}
        owners = np.searchsorted(batch.query_start, batch.logits_rows, side="right") - 1
        for index, (owner, row) in enumerate(zip(owners.tolist(), batch.sampling, strict=True)):
            length = int(batch.positions[batch.logits_rows[index]]) + 1
            context, more = contexts[owner][:length], int(surplus[owner])
            guesses = max(0, length - len(contexts[owner]) + _num_drafts(batch, owner))
            if not (excused and GARBAGE in context):
                is_ahead = planned.token_ids[planned.query_start[owner]] < 0
                _check_row(context, row, int(is_ahead) * (1 + more) + guesses, more)
            slot = -1 if row.target is not None else int(batch.slots[owner])
            assert batch.sampling_slots[index] == slot, "a token for another slot"
            if guesses and not row.drafts and last_runs[slot] != (int(context[-1]), guesses):
                result.token_ids.append(REJECTED)
                result.logprobs.append(None)
                continue
            token = self._next(int(context[-1]), row)
            if token == self.broken_token and row.target is None:
                result.failed[index] = ExecutionError("the counting executor broke this token")
            result.token_ids.append(token if row.target is None else -1)
            result.logprobs.append(_logprobs(token, row))
            last_runs[slot] = (token, guesses + 1)
        self._last_runs = last_runs
        return result

    def _placed(self, batch: StepBatch) -> tuple[StepBatch, IntArray]:
        """A step with what only the device knows put in: tokens, and for every sequence how much
        longer than one token the run before was."""
        tokens, surplus = batch.token_ids.copy(), np.zeros(len(batch.slots), np.int32)
        for index, slot in enumerate(batch.slots.tolist()):
            begin, end = batch.query_start[index : index + 2].tolist()
            drafts = _num_drafts(batch, index)
            most = min(self._draft_tokens or self.max_drafts, end - begin - 1)
            assert 0 <= drafts <= most, "too many guesses"
            if tokens[begin] < 0:
                assert self._on_their_way, "the host knows this token"
                tokens[begin], run = self._last_runs[slot]
                surplus[index] = run - 1
            if drafts and tokens[end - 1] < 0:
                row = batch.sampling[int(np.searchsorted(batch.logits_rows, end - 1))]
                last = int(tokens[begin]), int(batch.positions[begin] + surplus[index])
                tokens[end - drafts : end] = self.guessed(slot, last, drafts, row)
            assert (tokens[begin + 1 : end - drafts] >= 0).all(), "a token that nobody knows"
        return self._shifted(replace(batch, token_ids=tokens), surplus), surplus

    def _shifted(self, batch: StepBatch, surplus: IntArray) -> StepBatch:
        """A step whose sequences stand ``surplus`` positions further on."""
        owners = np.repeat(np.arange(len(surplus)), np.diff(batch.query_start))
        positions = batch.positions + surplus[owners]
        pages = {}
        for name, paged in batch.pages.items():
            size = self._page_sizes[name]
            table = paged.page_table
            slots = table[owners, batch.positions // size] * size + batch.positions % size
            assert np.array_equal(paged.slot_mapping, slots), "wrong slots"
            slots = table[owners, positions // size] * size + positions % size
            pages[name] = PagedInputs(table, slots)
        context_len = batch.context_len + surplus
        return replace(batch, positions=positions, context_len=context_len, pages=pages)

    def guessed(self, slot: int, last: tuple[int, int], count: int, row: SamplingRow) -> list[int]:
        """What is guessed to follow the ``last`` token of a slot, which has a position, right up to
        the length of the run."""
        token, right = last[0], run_length(*last, count) - 1
        guesses: list[int] = []
        for place in range(count):
            token = self._next(token, row)
            guesses.append(token if place < right else self._next(token, row))
        return guesses

    def _contexts(self, batch: StepBatch, tokens: IntArray, excused: bool) -> list[IntArray]:
        """Write a step to all caches of its graph and read every sequence back."""
        whole, others = self._caches[batch.graph]
        for cache in (whole, *others):
            cache.move(batch.moves)
            cache.write(batch, tokens)
        contexts = [whole.read(batch, index) for index in range(len(batch.context_len))]
        for index, context in enumerate(contexts):
            if not (excused and GARBAGE in context):
                for cache in others:
                    cache.check(batch, index, context)
        return contexts

    def _outputs(self, batch: StepBatch, tokens: IntArray) -> dict[str, NDArray[Any]]:
        rows = {"T": tokens, "L": tokens[batch.logits_rows]}
        outputs: dict[str, NDArray[Any]] = {}
        for name in batch.outputs:
            output = self._graphs[batch.graph].output(name)
            assert output is not None, f"{batch.graph} has no output {name}"
            of, *width = output.shape
            values = rows[str(of)].astype(output.dtype)
            outputs[name] = np.tile(values.reshape(-1, *(1 for _ in width)), (1, *map(int, width)))
        return outputs

    def _next(self, token: int, row: SamplingRow) -> int:
        if row.target is not None:
            return row.target
        if token == GARBAGE:
            return GARBAGE
        return next_token(token, self._vocab_size, 0 if row.params.greedy else row.seed)


class CountingStep:
    """A step on its way, ``ready`` at a time; it has failed if nothing has ``landed``."""

    def __init__(
        self, executor: CountingExecutor, landed: StepResult | None, batch: StepBatch
    ) -> None:
        self.sampled = False
        self.ready = 0.0
        self.batch = batch
        self.rows = batch.sampling
        self.landed = landed
        self._executor = executor

    @property
    def failed(self) -> bool:
        """Whether ``result`` will raise."""
        return self.landed is None

    def sample(self) -> CountingStep:
        """Verify that it is time, and ask what forms allow."""
        assert not self.sampled, "sampled twice"
        self._executor.check_head(self)
        self._executor.constrain(self)
        if self.landed is not None:
            reject(self.rows, self.landed)
        self.sampled = True
        return self

    def result(self) -> StepResult:
        """Hand over what was computed."""
        assert self.sampled, "the step was never sampled"
        self._executor.land(self)
        if self.landed is None:
            raise ExecutionError("the counting executor was told to fail this step")
        return self.landed


def _vocab_size(graph: GraphSpec) -> int:
    logits = graph.output(LOGITS)
    assert logits is not None
    return int(logits.shape[1])


def _caches_of_graphs(
    graphs: Mapping[str, GraphSpec], caches: Sequence[CacheSpec], num_pages: int
) -> dict[str, tuple[PagedTokens, list[CountingCache]]]:
    """For every graph one cache that holds whole contexts, and the others that it reads."""
    tokens = {
        cache.name: PagedTokens(cache, num_pages) for cache in caches if cache.kind == "paged"
    }
    made: dict[str, CountingCache] = {
        cache.name: tokens.get(cache.name) or HashedState(cache) for cache in caches
    }
    whole = [cache.name for cache in caches if cache.kind == "paged" and not cache.window]
    found = {}
    for name, graph in graphs.items():
        read = {port.cache for port in graph.inputs} - {None}
        first = next(cache for cache in whole if cache in read)
        found[name] = tokens[first], [made[c] for c in made if c in read and c != first]
    return found


def _num_drafts(batch: StepBatch, index: int) -> int:
    return batch.drafts[index] if batch.drafts else 0


def _check_row(context: IntArray, row: SamplingRow, num_unknown: int, surplus: int) -> None:
    """Compare what was read for a row with what the host knows, all but ``num_unknown`` tokens; its
    position lacks the ``surplus``."""
    known = [*row.prompt, *row.output]
    size = min(len(context), len(known))
    assert context[:size].tolist() == known[:size], "pages hold another sequence"
    assert context[size:].tolist()[: len(row.drafts)] == list(row.drafts), "other drafts"
    if row.target is None:
        assert len(context) == len(known) + num_unknown, "sampled too early"
        position = row.position + surplus
        assert position == len(context) - len(row.prompt), "sampled at another position"


def _logprobs(token: int, row: SamplingRow) -> TokenLogprobs | None:
    wanted = row.params.logprobs if row.target is None else row.params.prompt_logprobs
    if wanted is None:
        return None
    logprob = logprob_of(token)
    listed = row.params.logprob_token_ids if row.target is None else None
    top = {each: (logprob_of(each), 1) for each in listed or (token,)}
    return TokenLogprobs(token, logprob, 1, top)
