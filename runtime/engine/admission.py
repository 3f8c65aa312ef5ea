"""Who waits, who of them is to run next, and whether there is room."""

from __future__ import annotations

from bisect import insort
from itertools import islice
from operator import attrgetter

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.handover import Handover
from slipstream.runtime.engine.host_pages import HostPage
from slipstream.runtime.engine.kv_cache import KVCacheManager, Move
from slipstream.runtime.engine.radix_tree import Namespace, Node
from slipstream.runtime.engine.sequence import Sequence, Status

_ORDER = attrgetter("order")
# Tokens from which on it pays to wait for another that is computing them, and to be computed beside
# others that share them.
_WORTH = 256
_LOOK = 16  # of those that wait, who is looked at for one to run next


def _length(sequence: Sequence) -> int:
    return len(sequence.tokens)


def _is_computing(sequence: Sequence) -> bool:
    return sequence.allocation is not None and sequence.num_computed < sequence.num_prefill


class Admission:
    """The sequences that wait, and the way from there to those that run: a row of the page tables
    and pages, as many of them as the prefix cache has not, or is about to have.

    ``rows`` are free; whoever ends a sequence gives its row back.
    """

    def __init__(self, config: RuntimeConfig, kv: KVCacheManager, running: list[Sequence]) -> None:
        """``running`` is the scheduler's, in order; what is admitted goes there."""
        self.waiting: list[Sequence] = []
        self.num_tokens = 0  # that those have to compute, by what was cached when they came
        self.rows = list(range(config.max_batch_size - 1, -1, -1))
        self.prefix_queries = self.prefix_hits = 0  # in tokens
        self.host_queries = self.host_hits = 0  # of those that were no hits
        self.handed = 0  # tokens that other engines have computed
        self.evicts = config.scheduler_policy != "guaranteed_no_evict"
        self._running = running
        self._kv = kv
        self._chunked = config.enable_chunked_prefill
        self._caches_prefixes = config.enable_prefix_caching
        self._last_rows = config.max_batch_size // 8
        self.uncached: dict[Sequence, int] = {}  # of each of them
        self.shares = False  # whether a sequence ever began behind pages of others
        self._computing: list[Sequence] = []  # much of a prompt, or were when one was looked for
        self._awaited: dict[Sequence, Sequence] = {}  # of those, who computes what one wants

    @property
    def num_deferred(self) -> int:
        """How many wait because they leave the last rows to others; may be read from another
        thread."""
        if not 0 < len(self.rows) <= self._last_rows:
            return 0
        return sum(each.index > 0 for each in self.waiting[:])

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait in its order."""
        insort(self.waiting, sequence, key=_ORDER)
        uncached = _length(sequence) - self._match(sequence).depth * self._kv.page_size
        self.uncached[sequence] = uncached
        self.num_tokens += uncached

    def remove(self, sequence: Sequence) -> None:
        """Let one that waits do so no more."""
        self.waiting.remove(sequence)
        self._awaited.pop(sequence, None)
        self.num_tokens -= self.uncached.pop(sequence)

    def next(self) -> Sequence | None:
        """Who is to run next: the first that waits, but siblings (``n`` > 1) leave the last rows
        to other requests, which would else wait until they have ended; and whoever awaits what
        another computes lets others pass that leave it room."""
        last = len(self.rows) <= self._last_rows
        ready = (each for each in self.waiting if not each.index) if last else self.waiting
        pages = 0
        for kept, each in enumerate(islice(ready, _LOOK)):
            pages += self._kv.pages_for(_length(each))
            if not self.awaits(each):
                exact = not self.evicts or self._kv.windows  # where pages are not all it needs
                room = not exact and kept < len(self.rows) and pages <= self._kv.num_available
                return each if room or not kept else None
        return None

    def awaits(self, sequence: Sequence) -> bool:
        """Whether another still computes what this one was found to want."""
        other = self._awaited.get(sequence)
        return other is not None and _is_computing(other)

    def passing(self, first: Sequence) -> Sequence | None:
        """The one that waits with the least to compute, if there is room for it beside the only
        running prefill and the first that waits, and it has less to compute than that prefill and
        wants nothing that this is about to share."""
        waiting = self.waiting if self.rows else ()
        short = min(
            (s for s in waiting if not s.index), key=self.uncached.__getitem__, default=None
        )
        if short is None or short.pending or self.uncached[short] >= first.num_left:
            return None
        head, size = self.waiting[0], self._kv.page_size
        if short is not head:
            pages = self._kv.pages_for(_length(head)) + self._kv.pages_for(_length(short))
            exact = not self.evicts or self._kv.windows  # where pages are not all it needs
            if exact or len(self.rows) < 2 or pages > self._kv.num_available:
                return None
        prefix = self._match(short)
        next_page = slice(size * prefix.depth, size * (prefix.depth + 1))
        wanted, made = ((self._namespace(s), s.tokens[next_page]) for s in (short, first))
        shares = len(wanted[1]) == size and wanted == made
        return short if self._fits(short, prefix) and not shares else None

    def admit(self, sequence: Sequence, room: int) -> list[Move] | None:
        """Begin a sequence of which a step may compute ``room`` tokens, and return the moves that
        are made before that; None if it must wait."""
        # Of one that was preempted the host must know the tokens to compute them again.
        if sequence.pending or not (self.rows and self._kv.num_available):
            return None
        prefix = self._match(sequence)
        copied = self._num_copied(sequence, prefix)
        count = len(sequence.tokens) - prefix.depth * self._kv.page_size - copied
        enough = count <= room or (room and self._chunked)
        if not (enough and self._fits(sequence, prefix)) or self._finds_computing(sequence, prefix):
            return None
        self.remove(sequence)
        handover = self._handover(sequence, prefix)
        found = [] if copied or handover else self._find(sequence, prefix)
        self._start(sequence, prefix, found, handover)
        return self._fork(sequence, copied)

    def _match(self, sequence: Sequence) -> Node:
        if sequence.skips_none:
            return self._kv.no_match()
        return self._kv.match(sequence.tokens, self._namespace(sequence))

    def _find(self, sequence: Sequence, prefix: Node) -> list[HostPage]:
        if sequence.skips_none:
            return []
        return self._kv.find(sequence.tokens, prefix, self._namespace(sequence))

    def _handover(self, sequence: Sequence, prefix: Node) -> Handover | None:
        """What brings more of a sequence than ``prefix``; the slots of one that does not are free
        from now on."""
        handover = sequence.request.handover
        if handover is None or handover.stores or handover.queued:
            return None
        more = handover.num_tokens > prefix.depth * self._kv.page_size
        if more and not sequence.skips_none and self._kv.windows_take(prefix, handover):
            return handover
        handover.give_up()
        return None

    def _finds_computing(self, sequence: Sequence, prefix: Node) -> bool:
        """Whether one that runs is computing much of what this would compute once more: then that
        is soon to be had."""
        start = prefix.depth * self._kv.page_size
        end = start + _WORTH
        skips = sequence.skips_none or sequence.request.handover is not None
        if skips or not self._computing or len(sequence.tokens) <= end:
            return False
        self._computing = list(filter(_is_computing, self._computing))
        wanted, namespace = sequence.tokens[:end], self._namespace(sequence)
        for each in self._computing:
            if (
                each.num_prefill >= end
                and each.tokens[start] == wanted[start]  # of most the first differs
                and each.tokens[:end] == wanted
                and self._namespace(each) == namespace
            ):
                self._awaited[sequence] = each
                return True
        return False

    def _namespace(self, sequence: Sequence) -> Namespace:
        """With whom a sequence shares pages: at least with its siblings, by their arrival."""
        if self._caches_prefixes or sequence.request.params.n == 1:
            return sequence.request.cache_namespace
        return sequence.order[1]

    def _num_copied(self, sequence: Sequence, prefix: Node) -> int:
        """How many tokens after ``prefix`` can be had by copying the leader's last page of the
        prompt; the prompt's last token is computed again, for its logits."""
        leader, size = sequence.leader, self._kv.page_size
        if leader is None or leader.allocation is None:
            return 0
        shared, rest = divmod(sequence.prompt_len, size)
        ready = leader.num_computed >= sequence.prompt_len and prefix.depth == shared
        return max(0, rest - 1) if ready and self._kv.holds(leader.allocation, shared) else 0

    def _fork(self, sequence: Sequence, copied: int) -> list[Move]:
        """The moves that give a new sequence ``copied`` tokens of its leader."""
        leader, sequence.leader = sequence.leader, None
        if not copied:
            return []
        assert leader is not None and leader.allocation is not None and sequence.allocation
        sequence.num_scheduled += copied
        sequence.num_computed += copied
        index = sequence.allocation.prefix.depth
        return self._kv.copy_page(leader.allocation, sequence.allocation, index)

    def _fits(self, sequence: Sequence, prefix: Node) -> bool:
        if self.evicts:
            tokens = len(sequence.tokens)
            cost = self._kv.cost(prefix, self._kv.pages_for(tokens))
            return cost <= self._kv.num_available and self._kv.windows_fit(prefix, tokens)
        others = [(s.allocation, s.max_cached_tokens) for s in self._running if s.allocation]
        promised = sum(self._kv.pages_for(end) - len(held.pages) for held, end in others)
        own = sequence.max_cached_tokens
        cost = self._kv.cost(prefix, self._kv.pages_for(own))
        return cost + promised <= self._kv.num_available and self._kv.windows_fit_all(
            [own, *(end for _, end in others)]
        )

    def _start(
        self,
        sequence: Sequence,
        prefix: Node,
        found: list[HostPage],
        handover: Handover | None,
    ) -> None:
        tokens, shared = len(sequence.tokens), prefix.depth * self._kv.page_size
        sequence.allocation = self._kv.allocate(
            prefix, tokens, self._namespace(sequence), found, handover
        )
        sequence.num_prefill = tokens
        sequence.num_scheduled = shared + len(found) * self._kv.page_size
        if handover is not None:
            sequence.num_scheduled = handover.num_tokens
        sequence.num_computed = sequence.num_scheduled
        if shared >= _WORTH:
            sequence.group, self.shares = prefix.page, True
        if tokens - sequence.num_computed >= _WORTH and self._kv.shares(self._namespace(sequence)):
            self._computing.append(sequence)
        sequence.row = self.rows.pop()
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=_ORDER)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += tokens
            self.prefix_hits += shared
            if handover is None:
                self.host_queries += tokens - shared
                self.host_hits += sequence.num_cached - shared
            else:
                self.handed += sequence.num_cached - shared
