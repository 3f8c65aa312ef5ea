"""Decides, before every step, which sequences compute how many tokens."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.kv_cache import Allocation, KVCacheManager
from slipstream.runtime.engine.radix_tree import Node
from slipstream.runtime.engine.sequence import Sequence, Status

_ORDER = attrgetter("order")


@dataclass(slots=True)
class StepPlan:
    """Sequences of one step and how many tokens of each: decodes first, then prefill chunks.

    Of every sequence ``counts`` tokens from ``starts`` on are computed, in the pages that were its
    ``allocations`` then. ``outputs`` is the position in its output of the token that is sampled
    after them, -1 if there is more to compute first.
    """

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int) -> None:
        """Compute ``count`` more tokens of ``sequence``; sample the next if that is all of them."""
        assert sequence.allocation is not None
        start, total = sequence.num_scheduled, sequence.num_tokens
        self.sequences.append(sequence)
        self.counts.append(count)
        self.starts.append(start)
        self.allocations.append(sequence.allocation)
        sequence.num_scheduled = start + count
        if start + count == total:
            sequence.pending += 1
            self.outputs.append(total - sequence.prompt_len)
        else:
            self.outputs.append(-1)


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges of now and counters since the start; prefix counters are in tokens."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int


class Scheduler:
    """In-flight batching under a token budget, a sequence budget and a number of KV pages.

    Every plan is committed, in order, when its step has landed; before that the next may be
    scheduled. ``add`` and ``finish`` may come at any time between. A waiting sequence never
    overtakes one before it, and the first running one can always take pages from the last, so
    every sequence comes to its end.

    Pages that are given back while a step on its way still uses them can be given to others at
    once: the device takes steps in order, so whoever gets a page writes it after the last use.
    """

    def __init__(self, config: RuntimeConfig, num_pages: int) -> None:
        self.kv = KVCacheManager(num_pages, config.page_size, config.enable_prefix_caching)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._config = config
        self._reserve_all = config.scheduler_policy == "guaranteed_no_evict"
        self._rows = list(range(config.max_batch_size - 1, -1, -1))
        self._prefix_queries = self._prefix_hits = self._preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.running or self.waiting)

    @property
    def stats(self) -> SchedulerStats:
        """A snapshot; may be read from another thread."""
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv.usage,
            prefix_cache_queries=self._prefix_queries,
            prefix_cache_hits=self._prefix_hits,
            num_preemptions=self._preemptions,
        )

    def clamp_max_tokens(self, prompt_len: int, max_tokens: int | None) -> int:
        """``max_tokens`` clamped to the room after the prompt; None asks for all of it.

        Raises ``InvalidRequestError`` for a prompt that is empty or too long and ``CapacityError``
        for a request that would not fit in the KV pages even alone.
        """
        limit = self._config.max_seq_len
        if not 1 <= prompt_len < limit:
            raise InvalidRequestError(
                f"the prompt has {prompt_len} tokens; this engine takes 1 to {limit - 1}"
                f" (max_seq_len {limit} less one token to generate). Shorten the prompt or"
                " load the engine with a larger max_seq_len"
            )
        capacity = self.kv.num_pages * self.kv.page_size
        if max_tokens is None:
            max_tokens = max(1, capacity - prompt_len + 1)
        max_tokens = min(max_tokens, limit - prompt_len)
        if prompt_len + max_tokens - 1 > capacity:
            raise CapacityError(
                f"{prompt_len} prompt tokens and max_tokens {max_tokens} do not fit in the KV cache"
                f" of {self.kv.num_pages} pages ({capacity} tokens). Lower max_tokens, shorten the"
                " prompt, or raise kv_cache_bytes"
            )
        return max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose ``max_tokens`` has been clamped."""
        insort(self.waiting, sequence, key=_ORDER)

    def schedule(self) -> StepPlan:
        """Plan the next step; an empty plan means that there is nothing to compute, or nothing
        before a step on its way has landed."""
        self._make_room()
        plan = StepPlan()
        prefills: list[Sequence] = []
        for sequence in self.running:
            if sequence.num_tokens - sequence.num_scheduled > 1:
                prefills.append(sequence)
            elif not sequence.awaits_last:
                plan.add(sequence, 1)
        budget = self._config.max_num_tokens - len(plan.sequences)
        for sequence in prefills:
            count = min(budget, sequence.num_tokens - sequence.num_scheduled)
            if count:
                plan.add(sequence, count)
                budget -= count
        self._admit(plan, budget)
        return plan

    def commit(self, plan: StepPlan) -> None:
        """Note that the tokens of ``plan`` are in the KV cache, before those it sampled are taken.

        A sequence that ended or lost its pages while the step was on its way has nothing there.
        """
        size = self.kv.page_size
        chunks = zip(plan.sequences, plan.starts, plan.counts, plan.allocations, strict=True)
        for sequence, start, count, allocation in chunks:
            end = start + count
            if sequence.allocation is allocation:
                sequence.num_computed = end
                if end // size > start // size:
                    self.kv.commit(allocation, sequence.tokens, end)
            if sequence.followers and end >= sequence.prompt_len:
                for follower in sequence.followers:
                    self.add(follower)
                sequence.followers = []

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence at any stage and give its pages back."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.followers = []
        sequence.status = Status.FINISHED

    def _make_room(self) -> None:
        """Give every running sequence a page for its next token, if need be the last one's."""
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            assert sequence.allocation is not None
            if sequence.awaits_last or self.kv.grow(sequence.allocation, sequence.num_tokens):
                position += 1
            else:
                self._preempt(self.running.pop())

    def _preempt(self, sequence: Sequence) -> None:
        assert not self._reserve_all and self.running, "pages promised at admission are missing"
        self._release(sequence)
        sequence.status = Status.WAITING
        self._preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.allocation is not None
        self.kv.release(sequence.allocation)
        sequence.allocation = None
        self._rows.append(sequence.row)

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while budget and self.waiting and self._rows and self.kv.num_available:
            sequence = self.waiting[0]
            if sequence.pending:  # preempted: the host must know its tokens to compute them again
                return
            prefix = self._match(sequence)
            count = len(sequence.tokens) - prefix.depth * self.kv.page_size
            if count > budget and not self._config.enable_chunked_prefill:
                return
            if not self._fits(sequence, prefix):
                return
            self._start(self.waiting.pop(0), prefix)
            count = min(count, budget)
            plan.add(sequence, count)
            plan.admitted.append(sequence)
            budget -= count

    def _match(self, sequence: Sequence) -> Node:
        return self.kv.no_match() if sequence.scores_prompt else self.kv.match(sequence.tokens)

    def _fits(self, sequence: Sequence, prefix: Node) -> bool:
        if not self._reserve_all:
            pages = self.kv.pages_for(len(sequence.tokens))
            return self.kv.cost(prefix, pages) <= self.kv.num_available
        promised = sum(
            self._final_pages(s) - len(s.allocation.pages) for s in self.running if s.allocation
        )
        cost = self.kv.cost(prefix, self._final_pages(sequence))
        return cost + promised <= self.kv.num_available

    def _final_pages(self, sequence: Sequence) -> int:
        return self.kv.pages_for(sequence.max_cached_tokens)

    def _start(self, sequence: Sequence, prefix: Node) -> None:
        sequence.allocation = self.kv.allocate(prefix, len(sequence.tokens))
        sequence.num_scheduled = sequence.num_computed = prefix.depth * self.kv.page_size
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_ORDER)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self._prefix_queries += len(sequence.tokens)
            self._prefix_hits += sequence.num_cached
