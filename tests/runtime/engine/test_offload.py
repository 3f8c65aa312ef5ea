"""Pages that go to the host and come back, under the loop on the counting model, which reads every
context back from its pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.runtime.engine.driving import check, drain, expected_output, greedy, tokens_of
from tests.runtime.engine.recording import Recorder, recorded

from slipstream.builder.contract import CacheArray, CacheSpec
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.host_memory import reserve_host
from slipstream.runtime.request import Request
from slipstream.runtime.testing import counting_engine

PAGE = 4
ONE = 1 / (1 << 30)  # GiB: the counting model's pages have a byte


def cache(name: str, window: int = 0) -> CacheSpec:
    return CacheSpec(name, "paged", (0,), (CacheArray(name, "int32", (PAGE,)),), PAGE, window)


def loop_of(
    num_pages: int,
    host: int,
    *more: CacheSpec,
    runs_ahead: bool = False,
    **options: Any,  # noqa: ANN401 - fields of RuntimeConfig
) -> tuple[EngineLoop, Recorder]:
    return recorded(
        num_pages,
        runs_ahead=runs_ahead,
        more=more,
        **{
            "max_batch_size": 2,
            "max_num_tokens": 16,
            "max_seq_len": 32,
            "kv_offload_gib": host * ONE,
            **options,
        },
    )


def ask(loop: EngineLoop, prompt: list[int], name: str = "r", **options: Any) -> list[int]:  # noqa: ANN401
    """The answer of a request that runs alone."""
    namespace = options.pop("cache_namespace", "")
    loop.add_request(
        Request(name, prompt, greedy(max_tokens=2, **options), cache_namespace=namespace)
    )
    return tokens_of(drain(loop)[name])


def text(first: int, pages: int = 3) -> list[int]:
    return [first + i % 3 for i in range(pages * PAGE + 1)]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_prefix_that_left_the_device_comes_back(runs_ahead: bool) -> None:
    loop, device = loop_of(4, 8, runs_ahead=runs_ahead)
    for first in (0, 10, 0):
        assert ask(loop, text(first)) == [first + 1, first + 2]

    stats = loop.stats
    assert (stats.prefix_cache_hits, stats.host_hits) == (0, 3 * PAGE)
    assert stats.host_queries == stats.prefix_cache_queries == 3 * (3 * PAGE + 1)
    # Both texts went to the host; the pages of the first are there still when they go again.
    assert (stats.stored, stats.loaded) == (Traffic(6), Traffic(3))
    assert device.stored == stats.stored


def test_pages_go_before_others_come_in_their_place() -> None:
    loop, device = loop_of(4, 8)
    for first in (0, 10) * 3:  # each step stores one text, in whose pages it brings back the other
        assert ask(loop, text(first)) == [first + 1, first + 2]
    assert loop.stats.host_hits == 12 * PAGE and device.stored == Traffic(6)
    loop, device = loop_of(4, 3)  # what is on its way back keeps its place
    for first in (0, 10) * 3:
        assert ask(loop, text(first)) == [first + 1, first + 2]
    assert (loop.stats.host_hits, device.stored) == (6 * PAGE, Traffic(3))


def test_what_the_tree_has_is_taken_before_what_the_host_has() -> None:
    loop, _ = loop_of(5, 8)
    for first in (0, 10, 0):
        ask(loop, text(first))
    assert (loop.stats.prefix_cache_hits, loop.stats.host_hits) == (PAGE, 2 * PAGE)
    ask(loop, text(0))
    assert (loop.stats.prefix_cache_hits, loop.stats.host_hits) == (4 * PAGE, 2 * PAGE)


def test_a_namespace_reads_only_its_own() -> None:
    loop, _ = loop_of(4, 16)
    ask(loop, text(0), cache_namespace="a")
    ask(loop, text(10))
    ask(loop, text(0), cache_namespace="b")
    assert loop.stats.host_hits == 0
    ask(loop, text(10))
    ask(loop, text(0), cache_namespace="a")
    assert loop.stats.host_hits == 6 * PAGE


def test_a_prompt_that_is_scored_skips_none() -> None:
    loop, _ = loop_of(4, 8)
    ask(loop, text(0))
    ask(loop, text(10))
    ask(loop, text(0), prompt_logprobs=0)
    assert loop.stats.host_hits == 0


def test_a_preempted_sequence_comes_back_from_the_host() -> None:
    loop, device = loop_of(5, 8)
    for name, first in (("a", 0), ("b", 20)):
        prompt = [first + i % 3 for i in range(PAGE + 1)]
        loop.add_request(Request(name, prompt, greedy(max_tokens=14)))
    outputs = drain(loop)
    for name, request in (("a", 0), ("b", 20)):
        assert len(tokens_of(outputs[name])) == 14, request
    assert loop.stats.num_preemptions and device.loaded.num_bytes


def test_pages_with_a_window_come_back_with_the_others() -> None:
    loop, device = loop_of(4, 8, cache("near", window=3))
    for first in (0, 10, 0):
        assert ask(loop, text(first)) == [first + 1, first + 2]
    assert loop.stats.host_hits == 3 * PAGE
    # Of the group with a window only the last page is read again.
    assert device.loaded == Traffic(3 + 1)


def test_a_page_whose_window_is_lost_brings_nothing_back() -> None:
    loop, _ = loop_of(4, 8, cache("near", window=3))
    (group,) = loop.scheduler.kv.windows
    ask(loop, text(0))
    taken = [group._take() for _ in range(group.num_available)]  # others want the window's pages
    group._free.extend(taken)
    for first in (10, 0):
        ask(loop, text(first))
    assert loop.stats.host_hits == 0


def test_what_a_failed_step_was_to_store_is_not_read() -> None:
    loop, device = loop_of(4, 8)
    ask(loop, text(0))
    device.fail_next = True
    loop.add_request(Request("x", text(10), greedy()))
    drain(loop)
    assert device.stored == Traffic(0)
    assert ask(loop, text(0)) == [1, 2]
    assert loop.stats.host_hits == 0


def test_pages_of_a_broken_row_are_forgotten_on_the_host() -> None:
    loop, device = loop_of(4, 8)
    for first in (0, 10):
        ask(loop, text(first))
    device.broken_token = 1
    loop.add_request(Request("x", text(0), greedy()))
    drain(loop)
    assert loop.stats.host_hits == 3 * PAGE
    device.broken_token = None
    ask(loop, text(10))
    hits = loop.stats.host_hits
    ask(loop, text(0))
    assert loop.stats.host_hits == hits


def test_a_device_without_such_memory_says_so() -> None:
    class Plain:
        """Whatever an executor is, this is none that has a host."""

    plain: Any = Plain()
    engine = replace(counting_engine(kv_offload_gib=ONE), executor=plain)
    with pytest.raises(EngineMismatchError, match="Plain keeps no pages"):
        reserve_host(engine)
    state = CacheSpec("s", "state", (0,), (CacheArray("s", "int32", (1,)),))
    with pytest.raises(InvalidRequestError, match="'s' of this engine holds a state"):
        loop_of(4, 8, state)


@dataclass(frozen=True)
class Arrival:
    prompt: list[int]
    max_tokens: int
    n: int
    steps: int
    namespace: str
    aborted: bool


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        prompt=st.builds(
            lambda pages, rest: [t for page in pages for t in [page] * PAGE] + [5] * rest,
            st.lists(st.integers(0, 1), max_size=4),
            st.integers(1, PAGE),
        ),
        max_tokens=st.integers(1, 9),
        n=st.integers(1, 3),
        steps=st.integers(0, 5),
        namespace=st.sampled_from(["", "", "a"]),
        aborted=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
)


@given(
    arrivals=ARRIVALS,
    num_pages=st.integers(8, 11),
    host=st.integers(1, 12),
    runs_ahead=st.booleans(),
    budget=st.integers(4, 16),
    more=st.sampled_from(
        [(), (cache("wide"),), (cache("near", 3),), (cache("near", 6), cache("far", 11))]
    ),
)
@settings(max_examples=30, deadline=None)
def test_random_traffic_says_what_it_says_where_there_is_room(
    arrivals: list[Arrival],
    num_pages: int,
    host: int,
    runs_ahead: bool,
    budget: int,
    more: tuple[CacheSpec, ...],
) -> None:
    loop, _ = loop_of(num_pages, host, *more, runs_ahead=runs_ahead, max_num_tokens=budget)
    requests: dict[str, tuple[Request, bool]] = {}
    told: dict[str, Any] = {}
    for arrival in arrivals:
        params = greedy(max_tokens=arrival.max_tokens, n=arrival.n)
        name = str(len(requests))
        request = Request(name, arrival.prompt, params, cache_namespace=arrival.namespace)
        loop.add_request(request)
        requests[name] = request, arrival.aborted
        for _ in range(arrival.steps):
            told |= {each.request_id: each for each in loop.step()}
            check(loop)
        if arrival.aborted:
            loop.abort(name)
    told |= drain(loop)
    for name, (request, aborted) in requests.items():
        for index, completion in enumerate(told[name].outputs):
            expected, _ = expected_output(request, index)
            assert completion.token_ids == expected or aborted
