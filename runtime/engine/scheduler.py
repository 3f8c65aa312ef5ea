"""Decides, before every step, which sequences compute how many tokens."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import TYPE_CHECKING

from slipstream.builder.contract import CacheSpec
from slipstream.errors import CapacityError, ContextLengthError, InvalidRequestError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.admission import Admission
from slipstream.runtime.engine.cache_groups import kv_cache_manager
from slipstream.runtime.engine.host_pages import HostSpace
from slipstream.runtime.engine.kv_cache import NO_TRANSFERS, Allocation
from slipstream.runtime.engine.plan import MAX_STEP_DRAFTS, StepPlan
from slipstream.runtime.engine.prompt_share import PromptShare
from slipstream.runtime.engine.sequence import Sequence, Status
from slipstream.runtime.engine.stats import SchedulerStats

if TYPE_CHECKING:
    from slipstream.runtime.speculation.speculator import Speculator

_LEFT, _ORDER, _GROUP = map(attrgetter, ("num_left", "order", "group"))
_SHARE = 4  # of a step's tokens of prompts, one such part is for a short one


class Scheduler:
    """In-flight batching under a token budget, a sequence budget and a number of KV pages.

    Every plan is committed, in order, when its step has landed, and then its runs of more than one
    token are accepted; before that the next may be scheduled. ``add`` and ``finish`` may come at
    any time between. A waiting sequence never overtakes one before it, unless that is a sibling
    (``n`` > 1) where few rows are free, or awaits what another computes, or it has little to
    compute and passes a long prompt, of which most of every step is; in the latter two cases there
    must be room for those that are passed. The first running one can always take pages from the
    last, so every sequence comes to its end.

    Pages that are given back while a step on its way still uses them can be given to others at
    once: the device takes steps in order, so whoever gets a page writes it after the last use.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        num_pages: int,
        caches: tuple[CacheSpec, ...] = (),
        draft_tokens: int = 0,
        max_scored: int = sys.maxsize,
        speculator: Speculator | None = None,
        host: HostSpace | None = None,
        share: PromptShare | None = None,
    ) -> None:
        """``caches`` have ``num_pages`` pages each (``window_pages`` at most, where they have a
        window); the device guesses up to ``draft_tokens`` tokens a sequence and step, or else the
        ``speculator`` does, on the host, which then knows all tokens, or says how many of those
        that the device has guessed are verified. A step scores
        ``max_scored`` tokens of prompts, or one whole prompt where those are not chunked. Pages
        that have to go are kept on the ``host``. Where the configuration has no bound for prompts
        beside decodes, ``share`` is it, if there is one."""
        self.kv = kv_cache_manager(config, num_pages, caches, draft_tokens, host)
        self.running: list[Sequence] = []
        self._admission = Admission(config, self.kv, self.running)
        self.waiting = self._admission.waiting
        self._config = config
        self._draft_tokens = draft_tokens
        self._speculator = speculator
        chunked, beside = config.enable_chunked_prefill, config.max_prefill_tokens
        self._max_scored = max_scored if chunked else sys.maxsize
        self._max_beside = beside if chunked and beside != "auto" else sys.maxsize
        self._share = share if chunked and beside == "auto" else None
        self._preemptions = 0

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
            prefix_cache_queries=self._admission.prefix_queries,
            prefix_cache_hits=self._admission.prefix_hits,
            num_preemptions=self._preemptions,
            num_deferred=self._admission.num_deferred,
            num_pages=self.kv.num_pages,
            host_queries=self._admission.host_queries,
            host_hits=self._admission.host_hits,
            handed=self._admission.handed,
        )

    def clamp_max_tokens(self, prompt_len: int, max_tokens: int | None, pools: bool = False) -> int:
        """``max_tokens`` clamped to the room after the prompt, all of it for None; 1 if
        it ``pools``, which needs no room. Raises ``InvalidRequestError`` for an empty prompt,
        ``ContextLengthError`` for one that is too long, and ``CapacityError`` for a request that
        would not fit in the KV pages even alone."""
        limit = self._config.max_seq_len
        longest = limit - (not pools)
        if prompt_len < 1:
            raise InvalidRequestError(
                f"the prompt has 0 tokens; this engine takes 1 to {longest}. Give it some text",
                param="prompt",
            )
        if prompt_len > longest:
            raise ContextLengthError(prompt_len, limit, generates=not pools)
        capacity = self.kv.num_pages * self.kv.page_size
        if max_tokens is None:
            max_tokens = max(1, capacity - prompt_len + 1)
        max_tokens = 1 if pools else min(max_tokens, limit - prompt_len)
        if prompt_len + max_tokens - 1 > capacity:
            raise CapacityError(
                f"{'the prompt is too long: ' if prompt_len > capacity else ''}"
                f"{prompt_len} prompt tokens and max_tokens {max_tokens} do not fit in the KV cache"
                f" of {self.kv.num_pages} pages ({capacity} tokens). Lower max_tokens, shorten the"
                " prompt, or raise kv_cache_bytes",
                param="prompt" if prompt_len > capacity else "max_tokens",
            )
        self._check_windows(prompt_len + max_tokens - 1)
        return max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose ``max_tokens`` has been clamped."""
        self._admission.add(sequence)

    def schedule(self) -> StepPlan:
        """Plan the next step; an empty plan means that there is nothing to compute, or nothing
        before a step on its way has landed."""
        self._make_room()
        plan = StepPlan()
        prefills: list[Sequence] = []
        spare = self._config.max_num_tokens - len(self.running)
        running = self.running
        if self._admission.shares:  # neighbours find in a GPU's cache what both read
            running = sorted(running, key=_GROUP)
        for sequence in running:
            known = len(sequence.tokens) + sequence.pending
            left = known - sequence.num_scheduled
            if left > 1 and sequence.num_scheduled < sequence.num_prefill:
                prefills.append(sequence)
            elif known + sequence.num_drafted < sequence.max_len:  # or it ``awaits_last``
                count = min(left, 1 + spare)  # more than one where tokens were forced
                spare -= count - 1
                plan.add(sequence, count)
        if running is not self.running:
            prefills.sort(key=_ORDER)
        budget = self._config.max_num_tokens - sum(plan.counts)
        if self._draft_tokens:
            budget -= self._draft(plan, budget)
        elif self._speculator is not None and plan.sequences:
            busy = prefills or self.waiting  # with prompts, which most of a step is for
            limit = min(budget // _SHARE if busy else budget, MAX_STEP_DRAFTS)
            leads = self._speculator.leads(self.running)
            draft = self._lead if leads else self._guess
            budget -= draft(plan, self._speculator, limit)
        plan.num_decodes = len(plan.sequences)
        if prefills or self.waiting:
            self._prefill(plan, prefills, budget)
        plan.drafts += [0] * (len(plan.sequences) - len(plan.drafts))
        if plan.sequences:
            plan.transfers = self.kv.take_transfers()
        return plan

    def commit(self, plan: StepPlan, seconds: float) -> None:
        """Note that the tokens of ``plan`` are in the KV cache, which took so many ``seconds``,
        before those it sampled are taken.

        A sequence that ended or lost its pages while the step was on its way has nothing there.
        Guesses count when they are accepted.
        """
        if self._share is not None:
            decodes = sum(plan.counts[: plan.num_decodes])
            self._share.landed(decodes, sum(plan.counts) - decodes, seconds, plan.queued)
        if plan.transfers is not NO_TRANSFERS:
            self.kv.landed(plan.transfers)
        for index, sequence in enumerate(plan.sequences):
            count, allocation = plan.counts[index], plan.allocations[index]
            if drafts := plan.drafts[index]:
                count -= drafts
                sequence.num_drafted -= drafts
            if sequence.allocation is allocation:
                sequence.num_computed += count
                if sequence.num_computed >= allocation.due:
                    self.kv.commit(allocation, sequence.tokens, sequence.num_computed)
                handover = sequence.request.handover
                if handover is not None and sequence.hands_over:
                    self.kv.handovers.store(handover, allocation)
            if sequence.followers and plan.starts[index] + count >= sequence.prompt_len:
                for follower in sequence.followers:
                    follower.leader = sequence
                    self.add(follower)
                sequence.followers = []

    def accept(self, sequence: Sequence, run: list[int]) -> None:
        """Note that a committed step ended in a ``run`` of tokens, before they are taken: all but
        the last of them are in the KV cache. Pages that wrong guesses of the host took are free."""
        more = len(run) - 1
        sequence.pending += more
        sequence.num_scheduled += more
        allocation = sequence.allocation
        if allocation is not None:
            sequence.num_computed += more
            if sequence.num_computed >= allocation.due:
                self.kv.commit(allocation, sequence.tokens + run, sequence.num_computed)
            if self._speculator is not None:
                self.kv.shrink(allocation, sequence.num_scheduled + sequence.num_drafted)

    def finish(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        """Drop a sequence at any stage and give its pages back; nobody is to read ``spoiled`` ones
        again."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence, spoiled)
        elif sequence in self.waiting:
            self._admission.remove(sequence)
        sequence.followers, sequence.leader = [], None
        sequence.status = Status.FINISHED
        if sequence.request.handover is not None:
            sequence.request.handover.give_up()
        if self._speculator is not None:
            self._speculator.finish(sequence)

    def _check_windows(self, num_tokens: int) -> None:
        for group in self.kv.windows:
            pages = group.most_pages(num_tokens)
            if pages > group.num_pages:
                raise CapacityError(
                    f"a sequence of {num_tokens} tokens holds {pages} pages of cache"
                    f" {', '.join(group.caches)} at a time, which has {group.num_pages}. Lower"
                    " max_num_tokens or max_tokens, shorten the prompt, or raise kv_cache_bytes",
                    param="prompt",
                )

    def _make_room(self) -> None:
        """Give every running sequence pages for its next step, if need be the last one's."""
        size, position = self.kv.page_size, 0
        simple = not (self._draft_tokens or self.kv.windows)
        while position < len(self.running):
            sequence = self.running[position]
            allocation = sequence.allocation
            assert allocation is not None
            # Most often the last page has room, and asking is dearer than looking.
            tokens = len(sequence.tokens) + sequence.pending + sequence.num_drafted
            has_room = simple and tokens <= len(allocation.pages) * size
            if has_room or sequence.awaits_last or self._grow(sequence, allocation):
                position += 1
            else:
                self._preempt(self.running.pop())

    def _grow(self, sequence: Sequence, allocation: Allocation) -> bool:
        """Make room for the longest run that the next step of a sequence can begin and end in."""
        longest = sequence.num_tokens + sequence.num_drafted + self._draft_tokens
        tokens = min(longest, sequence.max_cached_tokens)
        if not self.kv.windows:
            return self.kv.grow(allocation, tokens)
        return self.kv.grow_windows(allocation, sequence.num_scheduled, tokens) and self.kv.grow(
            allocation, tokens
        )

    def _draft(self, plan: StepPlan, budget: int) -> int:
        """Give the decodes of a plan tokens to guess, within a budget, and return how many. No
        run can pass the end of its sequence, and the host must not be needed inside of it."""
        left = budget
        for sequence, start in zip(plan.sequences, plan.starts, strict=True):
            count = 0
            knows = not sequence.request.params.needs_output  # all that edits of its rows need
            if knows and start >= sequence.num_prefill:  # the device has sampled it before
                room = sequence.max_len - sequence.num_tokens - sequence.num_drafted
                count = min(self._draft_tokens, room, left)
            plan.draft(count)
            left -= count
        return budget - left

    def _guess(self, plan: StepPlan, speculator: Speculator, budget: int) -> int:
        """Give the decodes of a plan what the host guesses, within a budget and in pages that are
        to be had, and return how many tokens that are; none where it does not know the tokens
        before."""
        sequences = list(plan.sequences)
        room = list(map(_draft_room, sequences, plan.outputs))
        drafts = speculator.draft(sequences, room, budget)
        for sequence, start, guess in zip(sequences, plan.starts, drafts, strict=True):
            kept = guess if guess and self._holds(sequence, start, len(guess)) else []
            plan.draft(len(kept), kept)
        return sum(plan.drafts)

    def _lead(self, plan: StepPlan, speculator: Speculator, budget: int) -> int:
        """The same where the device has guessed, and need not wait for the host to know."""
        sequences = list(plan.sequences)
        room = list(map(_draft_room, sequences, plan.outputs))
        counts, plan.offered = speculator.lead(sequences, room, budget)
        for sequence, start, count in zip(sequences, plan.starts, counts, strict=True):
            plan.draft(count if count and self._holds(sequence, start, count) else 0)
            # Guesses after the step have places, too, where no other would miss the page.
            if sequence.allocation is not None and self.kv.num_available > len(self.running):
                longest = sequence.num_scheduled + sequence.num_drafted + speculator.most
                self.kv.grow(sequence.allocation, min(longest, sequence.max_cached_tokens))
        return sum(plan.drafts)

    def _holds(self, sequence: Sequence, start: int, drafts: int) -> bool:
        """Whether there are pages for drafts after what a step computes from ``start`` on, which it
        then has, whatever the step before ends in."""
        allocation, least = sequence.allocation, sequence.num_scheduled + sequence.num_drafted
        assert allocation is not None
        tokens = least + drafts
        held = self.kv.grow_windows(allocation, start, tokens) and self.kv.grow(allocation, tokens)
        if not held:  # some groups may have had them
            self.kv.shrink(allocation, least)
        return held

    def _preempt(self, sequence: Sequence) -> None:
        assert self._admission.evicts and self.running, "pages promised at admission are missing"
        self._release(sequence)
        sequence.status = Status.WAITING
        self._preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence, spoiled: bool = False) -> None:
        assert sequence.allocation is not None
        self.kv.release(sequence.allocation, spoiled=spoiled)
        sequence.allocation = None
        self._admission.rows.append(sequence.row)

    def _most_beside(self, plan: StepPlan, prefills: list[Sequence]) -> int:
        """Tokens of prompts that may go into a step of these decodes, which wait for all of it; by
        time only where somebody reads a token at a time."""
        if self._share is None or all(map(_is_told_whole, plan.sequences)):
            return self._max_beside
        waiting = self._admission.num_tokens + sum(map(_LEFT, prefills))
        speaking = len(plan.sequences)
        silent = min(len(prefills) + len(self.waiting), self._config.max_batch_size - speaking)
        most = self._share.most(sum(plan.counts), speaking, silent, waiting)
        plan.queued = self._share.is_queue(waiting)
        return self._max_beside if most is None else most

    def _prefill(self, plan: StepPlan, prefills: list[Sequence], budget: int) -> None:
        """Give the first prompt most of a budget, the shortest of the others up to a quarter of
        it, and what is left to the rest in their order."""
        if plan.sequences:  # which wait for all of this step
            budget = min(budget, self._most_beside(plan, prefills))
        if prefills:
            first, *others = prefills
            short = min(others, key=_LEFT) if others else self._admission.passing(first)
            need = 0 if short is None else self._admission.uncached.get(short, short.num_left)
            budget -= self._compute(plan, first, budget - min(budget // _SHARE, need))
            if short and not others:
                budget -= self._admit_one(plan, short, budget)
            for sequence in sorted(others, key=lambda each: each is not short):
                budget -= self._compute(plan, sequence, budget)
        while budget and (new := self._admission.next()) is not None:
            count = self._admit_one(plan, new, budget)
            if not count and not self._admission.awaits(new):
                return
            budget -= count

    def _compute(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """Add what a budget allows of a running sequence, and return how many tokens that are."""
        count = min(self._room(plan, sequence, budget), sequence.num_left)
        if count:
            plan.add(sequence, count)
        return count

    def _admit_one(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """Begin a sequence, if there is room for it, and return how many tokens are computed."""
        room = self._room(plan, sequence, budget)
        moves = self._admission.admit(sequence, room)
        if moves is None:
            return 0
        plan.moves += moves
        plan.add(sequence, count := min(room, sequence.num_left))
        plan.admitted.append(sequence)
        return count

    def _room(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """How many tokens of a sequence a step may still take within its budget: fewer where every
        one of them has logits."""
        if not sequence.scores_prompt:
            return budget
        scored = sum(
            count
            for other, count in zip(plan.sequences, plan.counts, strict=True)
            if other.scores_prompt
        )
        return min(budget, max(0, self._max_scored - scored))


def _is_told_whole(sequence: Sequence) -> bool:
    return sequence.request.output_kind == "final"


def _draft_room(sequence: Sequence, output: int) -> int:
    """How many drafts may follow what a step computes of a decode: none where it samples nothing,
    and none beyond the end."""
    drafts = output >= 0 and sequence.request.params.speculative
    return sequence.max_len - sequence.num_tokens - sequence.num_drafted if drafts else 0
