"""Drafts that the device makes and verifies a step ahead of the host, on the counting model."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import initialize
from tests.runtime.engine.driving import drain, greedy, tokens_of
from tests.runtime.engine.test_loop_properties import EngineLoopMachine
from tests.runtime.engine.test_run_ahead_properties import WORKLOADS, Arrival, run, same
from tests.runtime.speculation.leading import leading_engine

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.request import Request
from slipstream.runtime.testing import counting_engine


def answers(loop: EngineLoop, count: int = 3, **params: Any) -> dict[str, list[int]]:  # noqa: ANN401
    for number in range(count):
        one = greedy(**{"max_tokens": 24, **params})
        loop.add_request(Request(str(number), [number, number + 1], one))
    return {name: tokens_of(output) for name, output in drain(loop).items()}


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_step_with_drafts_starts_before_the_last_has_landed(length: int) -> None:
    engine, device = leading_engine(num_speculative_tokens=length)
    loop = EngineLoop(engine)
    assert answers(loop) == {str(n): [n + 2 + i for i in range(24)] for n in range(3)}
    stats = loop.stats.speculation
    assert stats is not None and 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert any(map(any, device.drafts[:-2]))
    steps = len(device.drafts)
    assert steps < 24
    # Two are started before one lands, and from then on one after the other, but at the end.
    sure = 2 * steps - 8
    assert device.events[:sure] == ["start", *["start", "land"] * steps][:sure]


@pytest.mark.parametrize("stop", [7, 8, 9, 10, 11])
@pytest.mark.parametrize("limit", [5, 6, 7, 8, 30])
def test_what_comes_after_the_end_is_not_told(stop: int, limit: int) -> None:
    """Wherever in a run of accepted drafts a stop token stands, or the last one."""
    engine, _ = leading_engine(num_speculative_tokens=7)
    loop = EngineLoop(engine)
    found = answers(loop, stop_token_ids=[stop], max_tokens=limit)
    for number in range(3):
        wanted = list(range(number + 2, stop + 1))[:limit]
        assert found[str(number)] == wanted
    assert loop.scheduler.kv.num_available == loop.scheduler.kv.num_pages


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 12},
        {"bad_words_token_ids": [[1, 2]]},
        {"prediction_token_ids": [2, 3, 9]},
    ],
)
def test_the_host_decides_beside_a_sequence_that_needs_it(params: dict[str, Any]) -> None:
    """And the device goes on by itself when that has ended, or needs it no more."""
    engine, device = leading_engine()
    loop = EngineLoop(engine)
    loop.add_request(Request("needs", [1], greedy(max_tokens=16, **params)))
    loop.add_request(Request("long", [30], greedy(max_tokens=60, ignore_eos=True)))
    outputs, needs = {}, True
    depths: dict[bool, set[int]] = {True: set(), False: set()}  # steps on their way at once
    while loop.has_work:
        seen = len(device.events)
        for output in loop.step():
            outputs[output.request_id] = output
            if output.request_id == "needs":
                enough = params.get("min_tokens", 16)
                needs = needs and len(output.outputs[0].token_ids) < enough
        for place in range(seen, len(device.events)):
            events = device.events[: place + 1]
            depths[needs].add(events.count("start") - events.count("land"))
    assert tokens_of(outputs["needs"]) == [2 + i for i in range(16)]
    assert tokens_of(outputs["long"]) == [(31 + i) % engine.vocab_size for i in range(60)]
    assert max(depths[False]) == 2
    assert max(depths[True]) == 1 or params.get("min_tokens") == 12
    assert any(map(any, device.drafts[:4]))


def test_a_request_that_wants_no_drafts_runs_beside_those_that_do() -> None:
    engine, device = leading_engine()
    loop = EngineLoop(engine)
    loop.add_request(Request("off", [1], greedy(max_tokens=20, speculative=False)))
    loop.add_request(Request("on", [30], greedy(max_tokens=20)))
    outputs = drain(loop)
    assert tokens_of(outputs["off"]) == [2 + i for i in range(20)]
    assert tokens_of(outputs["on"]) == [31 + i for i in range(20)]
    assert all(drafts[0] == 0 for drafts in device.drafts)
    assert any(len(drafts) > 1 and drafts[1] for drafts in device.drafts)


def test_nobody_is_preempted_for_a_draft() -> None:
    """Those that have no page for one take none."""
    engine, device = leading_engine(8, num_speculative_tokens=7, max_batch_size=2)
    loop = EngineLoop(engine)
    assert answers(loop, 2, max_tokens=15) == {
        str(n): [n + 2 + i for i in range(15)] for n in range(2)
    }
    assert not loop.stats.num_preemptions
    assert any(map(any, device.drafts))


@given(
    workload=WORKLOADS,
    num_pages=st.integers(3, 12),
    budget=st.integers(3, 24),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    caching=st.booleans(),
    length=st.sampled_from([1, 3, 7, "auto"]),
)
@settings(max_examples=100, deadline=None)
def test_leading_changes_no_answer(
    workload: list[Arrival],
    num_pages: int,
    budget: int,
    policy: str,
    caching: bool,
    length: int | str,
) -> None:
    options: dict[str, Any] = {
        "page_size": 3,
        "max_seq_len": 24,
        "max_batch_size": 3,
        "max_num_tokens": budget,
        "scheduler_policy": policy,
        "enable_prefix_caching": caching,
    }
    plain = run(EngineLoop(counting_engine(num_pages, **options)), workload)
    engine, _ = leading_engine(num_pages, **options, num_speculative_tokens=length)
    other = run(EngineLoop(engine), workload)
    assert plain.keys() == other.keys()
    for request_id, output in other.items():
        assert output.error is None and output.finished
        assert all(map(same, output.outputs, plain[request_id].outputs))


class LeadingMachine(EngineLoopMachine):
    """The same arrivals, aborts and failures, on a device that leads."""

    @initialize(
        num_pages=st.integers(3, 10),
        policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
        budget=st.integers(3, 12),
        jumps=st.booleans(),
        length=st.sampled_from([1, 3, 7, "auto"]),
        host_pages=st.sampled_from([None, 0, 1, 4]),
    )
    def open(
        self,
        num_pages: int,
        policy: str,
        budget: int,
        jumps: bool,
        length: int | str,
        host_pages: int | None,
    ) -> None:
        self.engine, _ = leading_engine(
            num_pages,
            page_size=3,
            max_seq_len=24,
            max_batch_size=3,
            max_num_tokens=budget,
            scheduler_policy=policy,
            enable_prefix_caching=host_pages is not None,
            kv_offload_gib=(host_pages or 0) / (1 << 30),
            enable_jump_decoding=jumps,
            num_speculative_tokens=length,
        )
        self.loop = EngineLoop(self.engine)
        self.requests = {}
        self.aborted = set()
        self.failures = 0
        self.outputs = {}


TestLeading = LeadingMachine.TestCase
TestLeading.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
