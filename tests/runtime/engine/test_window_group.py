"""Groups of caches under the scheduler, with a device whose memory remembers whole prefixes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from slipstream.builder.contract import CacheSpec
from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.cache_groups import kv_cache_manager, window_pages
from slipstream.runtime.engine.kv_cache import Allocation
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence, Status
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams

PAGE = 2
LIMITS = {"page_size": PAGE, "max_batch_size": 3, "max_num_tokens": 6, "max_seq_len": 40}


def cache(name: str, window: int = 0) -> CacheSpec:
    return CacheSpec(name, "paged", (), (), PAGE, window)


class Device:
    """Takes plans in order and at once; the model says 0 for ever."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.kv = scheduler.kv
        self.memory: dict[tuple[str, int], tuple[int, ...]] = {}

    def run(self, plan: StepPlan) -> None:
        for cache, source, destination in plan.moves:
            for offset in range(PAGE):
                content = self.memory.get((cache, source * PAGE + offset), ())
                self.memory[cache, destination * PAGE + offset] = content
        chunks = list(zip(plan.sequences, plan.starts, plan.counts, plan.allocations, strict=True))
        for sequence, start, count, allocation in chunks:
            tokens = self.tokens(sequence)
            for position in range(start, start + count):
                for cache, pages, _ in self.groups(allocation):
                    self.memory[cache, slot(pages, position)] = tokens[: position + 1]
        for sequence, start, count, allocation in chunks:
            tokens = self.tokens(sequence)
            for cache, pages, window in self.groups(allocation):
                for position in range(max(0, start - window + 1) if window else 0, start + count):
                    read = self.memory[cache, slot(pages, position)]
                    assert read == tokens[: position + 1], "a page of other tokens"

    def tokens(self, sequence: Sequence) -> tuple[int, ...]:
        return (*sequence.tokens, *[0] * sequence.pending)

    def groups(self, allocation: Allocation) -> list[tuple[str, list[int], int]]:
        groups = [(name, allocation.pages, 0) for name in self.kv.caches]
        for group, held in zip(self.kv.windows, allocation.windows, strict=True):
            groups += [(name, held.pages, group._window) for name in group.caches]
        return groups


def slot(pages: list[int], position: int) -> int:
    return pages[position // PAGE] * PAGE + position % PAGE


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before the next arrives
        st.lists(st.integers(0, 1), min_size=1, max_size=20),
        st.integers(1, 8),
        st.integers(1, 3),
        st.sampled_from(["", "", "salt"]),
    ),
    min_size=1,
    max_size=9,
)
CACHES = [
    (cache("kv"), cache("near", window=5)),
    (cache("kv"), cache("near", window=3), cache("more", window=3), cache("far", window=9)),
    (cache("near", window=4), cache("one", window=1)),
    (cache("kv"), cache("near", window=64)),
]


@given(
    requests=REQUESTS,
    caches=st.sampled_from(CACHES),
    num_pages=st.integers(8, 24),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    caching=st.booleans(),
    ahead=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_query_reads_its_own_window(
    requests: list[tuple[int, list[int], int, int, str]],
    caches: tuple[CacheSpec, ...],
    num_pages: int,
    policy: str,
    caching: bool,
    ahead: bool,
) -> None:
    config = RuntimeConfig().override(
        {**LIMITS, "scheduler_policy": policy, "enable_prefix_caching": caching}
    )
    scheduler = Scheduler(config, num_pages, caches)
    device, flights = Device(scheduler), list[StepPlan]()
    everyone: list[Sequence] = []

    def step() -> None:
        plan = scheduler.schedule()
        check(scheduler)
        assert plan.sequences or flights or not scheduler.has_work, "work without progress"
        if plan.sequences:
            device.run(plan)
            flights.append(plan)
        if flights and (len(flights) > ahead or not plan.sequences):
            land(scheduler, flights.pop(0))
        check(scheduler)

    for arrival, (steps, prompt, max_tokens, n, salt) in enumerate(requests):
        try:
            max_tokens = scheduler.clamp_max_tokens(len(prompt), max_tokens)
        except CapacityError:
            continue
        params = SamplingParams(max_tokens=max_tokens, n=n)
        request = Request(str(arrival), prompt, params, cache_namespace=salt)
        family = [Sequence(request, i, (0, arrival, i), max_tokens, seed=0) for i in range(n)]
        family[0].followers = family[1:]
        everyone += family
        scheduler.add(family[0])
        for _ in range(steps):
            step()
    for _ in range(1000):
        if not (scheduler.has_work or flights):
            break
        step()
    assert all(each.status is Status.FINISHED for each in everyone)
    assert scheduler.kv.usage == 0


def land(scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.commit(plan, 0.0)
    for sequence, output in zip(plan.sequences, plan.outputs, strict=True):
        if output >= 0 and sequence.status is not Status.FINISHED:
            sequence.append(0)
            if sequence.finish_reason:
                scheduler.finish(sequence)


def check(scheduler: Scheduler) -> None:
    scheduler.kv.check_invariants([s.allocation for s in scheduler.running if s.allocation])


def start(scheduler: Scheduler, prompt: list[int], max_tokens: int) -> Sequence:
    request = Request(str(id(prompt)), prompt, SamplingParams(max_tokens=max_tokens))
    sequence = Sequence(request, 0, (0, id(prompt), 0), max_tokens, seed=0)
    scheduler.add(sequence)
    return sequence


def test_pages_behind_the_window_are_given_back() -> None:
    scheduler = Scheduler(RuntimeConfig().override(LIMITS), 20, (cache("kv"), cache("near", 4)))
    long = start(scheduler, [1] * 20, max_tokens=16)
    (group,) = scheduler.kv.windows
    most = 0
    while scheduler.has_work:
        land(scheduler, scheduler.schedule())
        if long.allocation is not None:
            held = long.allocation.windows[0]
            most = max(most, len(held.pages) - held.first)
    assert most <= group.most_pages(36) == 6, "the window, a step, and a page cut in two"
    assert len(long.output) == 16


def test_a_prefix_is_hit_only_where_the_window_before_it_is_still_there() -> None:
    config = RuntimeConfig().override({**LIMITS, "max_batch_size": 1})
    scheduler = Scheduler(config, 40, (cache("kv"), cache("near", 4)))
    (group,) = scheduler.kv.windows
    first = start(scheduler, [1] * 20, max_tokens=1)
    while scheduler.has_work:
        land(scheduler, scheduler.schedule())
    assert first.finish_reason and scheduler.kv.match([1] * 20).depth == 9
    other = start(scheduler, [0] * 20, max_tokens=1)  # takes the few pages of the window
    while scheduler.has_work:
        land(scheduler, scheduler.schedule())
    assert other.finish_reason and scheduler.kv.num_available == 40
    hit = scheduler.kv.match([1] * 20)
    assert hit.depth < 9 and len(scheduler.kv._path(hit)) == hit.depth
    assert group.serves(scheduler.kv._path(hit)) or hit.depth == 0


def test_states_are_computed_from_the_start() -> None:
    caches = (cache("kv"), CacheSpec("states", "state", (), ()))
    scheduler = Scheduler(RuntimeConfig().override(LIMITS), 20, caches)
    for _ in range(2):
        again = start(scheduler, [1] * 12, max_tokens=1)
        while scheduler.has_work:
            land(scheduler, scheduler.schedule())
        assert again.num_cached == 0


def test_caches_of_different_page_sizes_are_refused() -> None:
    caches = (cache("kv"), CacheSpec("near", "paged", (), (), 2 * PAGE, 8))
    with pytest.raises(EngineMismatchError, match="'near' has pages of 4 tokens"):
        kv_cache_manager(RuntimeConfig().override(LIMITS), 8, caches)


def test_a_cache_with_a_window_needs_no_more_than_a_full_batch_holds() -> None:
    config = RuntimeConfig().override(LIMITS)
    assert window_pages(4, 1000, config) == 3 * 6
    assert window_pages(4, 10, config) == 10


def test_a_window_that_no_step_fits_in_is_refused() -> None:
    scheduler = Scheduler(RuntimeConfig().override(LIMITS), 5, (cache("near", window=4),))
    with pytest.raises(CapacityError, match="pages of cache near at a time"):
        scheduler.clamp_max_tokens(20, 1)


def test_pages_promised_to_the_end_are_there_when_a_shared_one_is_given_up() -> None:
    limits = LIMITS | {"max_num_tokens": 4, "max_seq_len": 80}
    config = RuntimeConfig().override({**limits, "scheduler_policy": "guaranteed_no_evict"})
    scheduler = Scheduler(config, 14, (cache("near", window=12),))
    first = start(scheduler, [1] * 12 + [2] * 2, max_tokens=27)
    for _ in range(4):
        land(scheduler, scheduler.schedule())
    second = start(scheduler, [1] * 12 + [3] * 19, max_tokens=23)
    while scheduler.has_work:
        land(scheduler, scheduler.schedule())
        check(scheduler)
    assert (len(first.output), len(second.output)) == (27, 23)
