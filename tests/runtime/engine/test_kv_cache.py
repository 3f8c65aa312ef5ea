from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from slipstream.runtime.engine.kv_cache import Allocation, KVCacheManager

PAGE = 2


def computed(kv: KVCacheManager, tokens: list[int]) -> Allocation:
    """A sequence whose tokens are all in the cache."""
    allocation = kv.allocate(kv.match(tokens), len(tokens))
    kv.commit(allocation, tokens, len(tokens))
    return allocation


def test_a_match_always_leaves_a_token_to_compute() -> None:
    kv = KVCacheManager(8, PAGE)
    kv.release(computed(kv, [1, 2, 3, 4]))

    assert kv.match([1, 2, 3, 4]).depth == 1
    assert kv.match([1, 2, 3, 4, 5]).depth == 2
    assert kv.match([1, 2]).depth == 0


def test_a_prefix_is_shared_while_and_after_its_owner_runs() -> None:
    kv = KVCacheManager(8, PAGE)
    first = computed(kv, [1, 2, 3, 4, 5])
    second = kv.allocate(kv.match([1, 2, 3, 4, 6]), 5)

    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    kv.check_invariants([first, second])
    kv.release(first)
    kv.release(second)
    assert kv.num_available == 8
    assert kv.match([1, 2, 3, 4, 5]).depth == 2


def test_equal_pages_computed_side_by_side_become_one() -> None:
    kv = KVCacheManager(4, PAGE)
    tokens = [1, 2, 3]
    first, second = (kv.allocate(kv.match(tokens), 3) for _ in range(2))
    second.synced = 2
    assert kv.num_available == 0
    kv.commit(first, tokens, 3)
    kv.commit(second, tokens, 3)

    assert second.pages[0] == first.pages[0]
    assert second.synced == 0, "the page table row must be written again"
    assert kv.num_available == 1
    kv.check_invariants([first, second])


def test_growing_evicts_cached_pages_and_fails_when_all_are_held() -> None:
    kv = KVCacheManager(2, PAGE)
    kv.release(computed(kv, [1, 2]))
    allocation = kv.allocate(kv.match([7]), 1)

    assert kv.grow(allocation, 2) and len(allocation.pages) == 1
    assert kv.grow(allocation, 3) and len(allocation.pages) == 2
    assert not kv.grow(allocation, 5)
    assert kv.match([1, 2, 3]).depth == 0
    kv.check_invariants([allocation])


def test_cost_counts_cached_pages_that_would_stop_being_available() -> None:
    kv = KVCacheManager(4, PAGE)
    owner = computed(kv, [1, 2, 3, 4])
    prefix = kv.match([1, 2, 3, 4, 5])
    assert kv.cost(prefix, 3) == 1
    kv.release(owner)
    assert kv.cost(prefix, 3) == 3


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = KVCacheManager(4, PAGE, enable_prefix_caching=False)
    kv.release(computed(kv, [1, 2, 3, 4, 5]))
    assert kv.match([1, 2, 3, 4, 5]).depth == 0
    assert kv.usage == 0


def test_the_check_notices_a_leak() -> None:
    kv = KVCacheManager(4, PAGE)
    computed(kv, [1, 2, 3])
    with pytest.raises(AssertionError):
        kv.check_invariants([])


@dataclass(eq=False)
class Holder:
    tokens: list[int]
    allocation: Allocation
    num_computed: int


class KVCacheMachine(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet in six pages; ``memory`` plays the device."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(6, PAGE)
        self.memory: dict[int, int] = {}
        self.live: list[Holder] = []

    @rule(target=holders, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def admit(self, tokens: list[int]) -> Holder:
        prefix = self.kv.match(tokens)
        holder = Holder(tokens, Allocation([], self.kv.no_match()), 0)
        if self.kv.cost(prefix, self.kv.pages_for(len(tokens))) <= self.kv.num_available:
            holder.allocation = self.kv.allocate(prefix, len(tokens))
            holder.num_computed = prefix.depth * PAGE
            self.live.append(holder)
        return holder

    @rule(holder=holders, count=st.integers(1, 4))
    def compute(self, holder: Holder, count: int) -> None:
        if holder in self.live:
            end = min(holder.num_computed + count, len(holder.tokens))
            for position in range(holder.num_computed, end):
                self.memory[self.slot(holder, position)] = holder.tokens[position]
            holder.num_computed = end
            self.kv.commit(holder.allocation, holder.tokens, end)

    @rule(holder=holders, token=st.integers(0, 1))
    def decode(self, holder: Holder, token: int) -> None:
        if holder in self.live and self.kv.grow(holder.allocation, len(holder.tokens) + 1):
            holder.tokens.append(token)

    @rule(holder=consumes(holders))
    def release(self, holder: Holder) -> None:
        if holder in self.live:
            self.live.remove(holder)
            self.kv.release(holder.allocation)

    @precondition(lambda self: not self.live)
    @rule()
    def everything_is_available_again(self) -> None:
        assert self.kv.num_available == self.kv.num_pages

    @invariant()
    def pages_add_up(self) -> None:
        self.kv.check_invariants([holder.allocation for holder in self.live])

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for holder in self.live:
            read = [self.memory[self.slot(holder, p)] for p in range(holder.num_computed)]
            assert read == holder.tokens[: holder.num_computed]

    def slot(self, holder: Holder, position: int) -> int:
        return holder.allocation.pages[position // PAGE] * PAGE + position % PAGE


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
