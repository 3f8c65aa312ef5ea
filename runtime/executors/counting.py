"""A model without weights: the next token is a closed form, and the caches hold the tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
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
    IntArray,
    SamplingRow,
    StepBatch,
    StepResult,
    TokenLogprobs,
)
from slipstream.runtime.executors.counting_caches import (
    GARBAGE,
    CountingCache,
    HashedState,
    PagedTokens,
)
from slipstream.runtime.sampling.params import SamplingParams


def counting_contract(
    page_size: int, vocab_size: int
) -> tuple[dict[str, GraphSpec], tuple[CacheSpec, ...]]:
    """One graph and one paged cache."""
    array = CacheArray("kv_cache", "int32", (page_size,))
    caches = (CacheSpec(KV, "paged", (0,), (array,), page_size),)
    logits = Output(LOGITS, "float32", ("L", vocab_size))
    return {TARGET_GRAPH: GraphSpec("", tuple(ports_of(caches)), (logits,))}, caches


def next_token(token: int, vocab_size: int, seed: int = 0) -> int:
    """What follows ``token``; a sampled (not greedy) sequence strides by 1 + ``seed``."""
    return (token + 1 + seed) % vocab_size


def logprob_of(token: int) -> float:
    """The made-up log probability of ``token``, exact in binary."""
    return -(1 + token % 8) / 8


class CountingExecutor:
    """Runs steps of the counting model and verifies that they were scheduled and paged correctly.

    Every step writes its token ids to the caches of its graph and reads each whole context back;
    anything but the tokens of the sequence is an ``AssertionError``. Further outputs hold the token
    of each row. Set ``fail_next`` to make the next step fail (and leave garbage in its slots);
    ``delay`` is seconds a step, ``steps`` counts them, and ``closed`` tells whether ``shutdown``
    was called.

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
    ) -> None:
        """``graphs`` and ``caches`` are an engine's; every graph reads a paged cache without a
        window."""
        self.delay = delay
        self.fail_next = False
        self.steps = 0
        self.closed = False
        self._runs_ahead = runs_ahead
        self._num_pages = num_pages
        self._graphs = graphs
        self._vocab_size = _vocab_size(graphs[TARGET_GRAPH])
        self._caches = _caches_of_graphs(graphs, caches, num_pages)
        # What the step before sampled, by the slot of the sequence.
        self._last_tokens: dict[int, int] = {}
        self._on_their_way: deque[CountingStep] = deque()

    @property
    def runs_ahead(self) -> bool:
        """As given at construction."""
        return self._runs_ahead

    def runs_ahead_of(self, params: SamplingParams) -> bool:
        """Whether ``params`` have no bad words of several tokens: an example of what needs the
        host."""
        return all(len(word) == 1 for word in params.bad_words_token_ids)

    def reserve_kv(self, num_bytes: int | None) -> int:
        """The number of pages given at construction; a page has no bytes."""
        return self._num_pages

    def submit(self, batch: StepBatch) -> CountingStep:
        """Run a step whose result is handed over when it is wanted."""
        failing, self.fail_next = self.fail_next, False
        in_lockstep = not all(map(self._may_run_ahead, batch.sampling))
        self._check_order(in_lockstep)
        self.steps += 1
        # What follows a step that fails works on garbage until the host has heard of it.
        excused = any(step.failed for step in self._on_their_way)
        result = None
        if failing:
            self._spoil(batch)
        else:
            result = self._run(batch, excused)
        step = CountingStep(self, result, in_lockstep)
        self._on_their_way.append(step)
        return step

    def land(self, step: CountingStep) -> None:
        """Note that a step's result is handed over."""
        assert self._on_their_way.popleft() is step, "results are taken out of order"
        if self.delay:
            time.sleep(self.delay)

    def shutdown(self) -> None:
        """Only remembered: there is nothing to free."""
        self.closed = True

    def _may_run_ahead(self, row: SamplingRow) -> bool:
        return row.target is None and self.runs_ahead_of(row.params)

    def _check_order(self, in_lockstep: bool) -> None:
        others = self._on_their_way
        assert len(others) <= self._runs_ahead, "too many steps on their way"
        in_lockstep = in_lockstep or any(step.in_lockstep for step in others)
        assert not (others and in_lockstep), "the host must know all tokens before this step"

    def _spoil(self, batch: StepBatch) -> None:
        """Leave garbage wherever a step would have written."""
        whole, others = self._caches[batch.graph]
        for cache in (whole, *others):
            cache.spoil(batch)
        self._last_tokens = dict.fromkeys(batch.sampling_slots.tolist(), GARBAGE)

    def _run(self, batch: StepBatch, excused: bool) -> StepResult:
        """Compute a step; only what ``excused`` sequences read may be garbage."""
        assert len(np.unique(batch.slots)) == len(batch.slots), "two sequences in a slot"
        tokens = self._token_ids(batch)
        contexts = self._contexts(batch, tokens, excused)
        result = StepResult([], [], self._outputs(batch, tokens))
        last_tokens: dict[int, int] = {}
        owners = np.searchsorted(batch.query_start, batch.logits_rows, side="right") - 1
        for index, (owner, row) in enumerate(zip(owners, batch.sampling, strict=True)):
            token_row = batch.logits_rows[index]
            context = contexts[owner][: batch.positions[token_row] + 1]
            if not (excused and GARBAGE in context):
                _check_row(context, row, num_unknown=int(batch.token_ids[token_row] < 0))
            token = self._next(int(context[-1]), row)
            result.token_ids.append(token if row.target is None else -1)
            result.logprobs.append(_logprobs(token, row))
            slot = -1 if row.target is not None else batch.slots[owner]
            assert batch.sampling_slots[index] == slot, "a token for another slot"
            last_tokens[int(slot)] = token
        self._last_tokens = last_tokens
        return result

    def _token_ids(self, batch: StepBatch) -> IntArray:
        """The tokens of a step, with those that only the device knows put in."""
        token_ids = batch.token_ids.copy()
        owners = np.repeat(batch.slots, np.diff(batch.query_start))
        for row in np.flatnonzero(token_ids < 0):
            assert self._on_their_way, "the host knows this token"
            token_ids[row] = self._last_tokens[int(owners[row])]
        return token_ids

    def _contexts(self, batch: StepBatch, tokens: IntArray, excused: bool) -> list[IntArray]:
        """Write a step to all caches of its graph and read every sequence back."""
        whole, others = self._caches[batch.graph]
        for cache in (whole, *others):
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
        return next_token(token, self._vocab_size, row.seed if row.params.temperature else 0)


class CountingStep:
    """A step on its way; it has failed if there is no ``result``."""

    def __init__(
        self, executor: CountingExecutor, result: StepResult | None, in_lockstep: bool
    ) -> None:
        self.in_lockstep = in_lockstep
        self._executor = executor
        self._result = result

    @property
    def failed(self) -> bool:
        """Whether ``result`` will raise."""
        return self._result is None

    def result(self) -> StepResult:
        """Hand over what was computed."""
        self._executor.land(self)
        if self._result is None:
            raise ExecutionError("the counting executor was told to fail this step")
        return self._result


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


def _check_row(context: IntArray, row: SamplingRow, num_unknown: int) -> None:
    """Compare what was read for a row with what the host knows, all but ``num_unknown`` tokens."""
    known = [*row.prompt, *row.output]
    size = min(len(context), len(known))
    assert context[:size].tolist() == known[:size], "pages hold another sequence"
    if row.target is None:
        assert len(context) == len(known) + num_unknown, "sampled too early"
        assert row.position == len(context) - len(row.prompt), "sampled at another position"


def _logprobs(token: int, row: SamplingRow) -> TokenLogprobs | None:
    wanted = row.params.logprobs if row.target is None else row.params.prompt_logprobs
    if wanted is None:
        return None
    logprob = logprob_of(token)
    return TokenLogprobs(token, logprob, 1, {token: (logprob, 1)})
