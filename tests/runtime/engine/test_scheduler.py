from __future__ import annotations

import subprocess
import sys

import pytest
from tests.runtime.engine.scheduling import (
    check,
    drain,
    land,
    planned,
    scheduler,
    sequence,
    start,
    step,
)

from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.runtime.engine.sequence import Sequence, Status


def test_scheduling_needs_no_tensor_library() -> None:
    code = (
        "import sys, slipstream.runtime.engine.scheduler as s; assert 'numpy' not in sys.modules, s"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decodes_come_first_and_prefill_chunks_fill_the_budget() -> None:
    engine = scheduler()
    short, long = sequence([1, 2, 3]), sequence(list(range(40)))
    engine.add(short)
    step(engine)
    engine.add(long)

    assert planned(step(engine)) == [(short, 1), (long, 15)]
    assert planned(step(engine)) == [(short, 1), (long, 15)]
    assert planned(step(engine)) == [(short, 1), (long, 10)]
    assert planned(step(engine)) == [(long, 1)], "the short one had its four tokens"


def test_prompts_are_bounded_while_others_wait_for_their_next_token() -> None:
    engine = scheduler(max_prefill_tokens=5)
    short, long = sequence([1, 2, 3], 2), sequence(list(range(30)))
    engine.add(short)
    step(engine)
    engine.add(long)

    assert planned(step(engine)) == [(short, 1), (long, 5)]
    assert short.finish_reason == "length"
    assert planned(step(engine)) == [(long, 16)], "nobody waits any more"


def test_a_short_prompt_passes_a_long_one() -> None:
    engine = scheduler(num_pages=64)
    long, later = sequence([1] * 60, 1), sequence([2] * 50, 1)
    short = sequence([3] * 6, 1)
    engine.add(long)
    step(engine)
    engine.add(later)
    engine.add(short)

    assert planned(step(engine)) == [(long, 12), (short, 4)]
    assert planned(step(engine)) == [(long, 14), (short, 2)]
    assert short.finish_reason == "length"
    assert planned(step(engine)) == [(long, 16)], "the other is no shorter than what is left"
    drain(engine)


def test_what_passes_leaves_a_row_and_pages_to_the_first_that_waits() -> None:
    for pages, rows in ((64, 2), (16 + 13, 4)):
        engine = scheduler(num_pages=pages, max_batch_size=rows)
        long, later, short = sequence([1] * 60, 1), sequence([2] * 50, 1), sequence([3] * 6, 1)
        engine.add(long)
        step(engine)
        engine.add(later)
        engine.add(short)
        assert planned(step(engine)) == [(long, 16)]
        drain(engine)


def test_a_long_prompt_leaves_nothing_to_one_for_which_there_is_no_room() -> None:
    for pages, rows in ((64, 2), (17, 4)):
        engine = scheduler(num_pages=pages, max_batch_size=rows)
        engine.add(decoding := sequence([4], 8))
        step(engine)
        long, short = sequence([1] * 60, 1), sequence([3] * 6, 1)
        engine.add(long)
        step(engine)
        engine.add(short)
        assert planned(step(engine)) == [(decoding, 1), (long, 15)]
        drain(engine)


def test_a_prompt_waits_for_what_is_about_to_be_shared() -> None:
    engine = scheduler(num_pages=64)
    long, short = sequence([1] * 60, 1), sequence([1] * 20, 1)
    engine.add(long)
    step(engine)
    engine.add(short)
    assert planned(step(engine)) == [(long, 16)]
    drain(engine)
    assert short.num_cached and short.num_cached >= 16


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    engine = scheduler(enable_chunked_prefill=False, max_seq_len=16)
    first, second = sequence([1] * 10), sequence([2] * 10)
    engine.add(first)
    engine.add(second)

    assert planned(step(engine)) == [(first, 10)]
    assert planned(step(engine)) == [(first, 1), (second, 10)]


def test_lower_priority_values_run_first_and_equal_ones_in_order_of_arrival() -> None:
    engine = scheduler(max_batch_size=1)
    order = [sequence([1], 1, priority) for priority in (5, 0, 5, -1)]
    for each in order:
        engine.add(each)

    ran = [step(engine).sequences[0] for _ in order]
    assert ran == [order[3], order[1], order[0], order[2]]


def test_when_pages_run_out_the_last_in_order_is_preempted_and_resumes() -> None:
    engine = scheduler(num_pages=4)
    late_but_urgent = sequence([1] * 6, max_tokens=10, priority=-1)
    early = sequence([2] * 6, max_tokens=10)
    engine.add(early)
    step(engine)
    engine.add(late_but_urgent)
    while not engine.stats.num_preemptions:
        step(engine)

    assert early.status is Status.WAITING and len(early.output) > 0
    assert late_but_urgent.status is Status.RUNNING
    drain(engine)
    assert len(early.output) == len(late_but_urgent.output) == 10


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = scheduler(num_pages=5)
    first, second = sequence([1] * 7, max_tokens=8), sequence([2] * 7, max_tokens=8)
    engine.add(first)
    engine.add(second)
    while second.status is not Status.WAITING or not engine.stats.num_preemptions:
        step(engine)
    while second.status is Status.WAITING:
        plan = step(engine)

    assert second in plan.admitted
    assert plan.counts[plan.sequences.index(second)] < len(second.tokens) - 1
    assert second.num_cached == 0, "what was cached for itself is not a prefix hit"


def test_guaranteed_no_evict_admits_only_what_can_run_to_its_end() -> None:
    engine = scheduler(num_pages=5, scheduler_policy="guaranteed_no_evict")
    first, second = sequence([1] * 4, max_tokens=9), sequence([2] * 4, max_tokens=9)  # 3 pages each
    engine.add(first)
    engine.add(second)

    step(engine)
    assert (engine.running, engine.waiting) == ([first], [second])
    drain(engine)
    assert engine.stats.num_preemptions == 0


def test_guaranteed_no_evict_counts_evictable_prefix_pages_as_free() -> None:
    engine = scheduler(num_pages=4, scheduler_policy="guaranteed_no_evict")
    engine.add(sequence([1] * 12, max_tokens=1))
    drain(engine)
    engine.add(same := sequence([1] * 13, max_tokens=4))
    step(engine)
    assert same.num_cached == 12
    drain(engine)
    engine.add(other := sequence([2] * 13, max_tokens=4))
    step(engine)
    assert other.status is Status.RUNNING and other.num_cached == 0


def test_prefix_hits_are_counted_in_tokens() -> None:
    engine = scheduler()
    engine.add(sequence([1] * 10))
    step(engine)
    engine.add(sequence([1] * 10))
    step(engine)

    assert (engine.stats.prefix_cache_queries, engine.stats.prefix_cache_hits) == (20, 8)
    drain(engine)


def test_scoring_a_prompt_computes_all_of_it() -> None:
    engine = scheduler()
    engine.add(sequence([1] * 10))
    drain(engine)
    scored = sequence([1] * 10)
    scored.prompt_logprobs = [None]
    engine.add(scored)

    assert planned(step(engine)) == [(scored, 10)]


def test_siblings_start_when_the_prompt_is_computed_and_share_its_pages() -> None:
    engine = scheduler()
    leader, sibling = sequence([1] * 20), sequence([1] * 20)
    leader.followers = [sibling]
    engine.add(leader)

    assert planned(step(engine)) == [(leader, 16)]
    assert planned(step(engine)) == [(leader, 4)]
    assert planned(step(engine)) == [(leader, 1), (sibling, 4)]
    drain(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_sequence_can_end_at_any_stage(steps: int) -> None:
    engine = scheduler(max_batch_size=2)
    others = [sequence([1, 2, 3]), sequence([4, 5, 6])]
    for each in others:
        engine.add(each)
    victim = sequence(list(range(30)))
    engine.add(victim)
    for _ in range(steps):
        step(engine)

    engine.finish(victim)
    check(engine)
    drain(engine)
    assert [len(each.output) for each in others] == [4, 4]


def test_ending_while_the_step_is_on_its_way_commits_nothing() -> None:
    engine = scheduler()
    engine.add(victim := sequence([1] * 8))
    plan = engine.schedule()
    engine.finish(victim)
    engine.commit(plan, 0.0)
    check(engine)

    assert victim.num_computed == 0
    assert engine.kv.match([1] * 9).depth == 0


def test_a_step_can_be_planned_before_the_last_one_has_landed() -> None:
    engine = scheduler()
    only = sequence([1] * 20, max_tokens=3)
    engine.add(only)
    plans = [start(engine) for _ in range(2)]
    assert [plan.counts for plan in plans] == [[16], [4]]
    assert (only.num_computed, only.num_scheduled, only.num_tokens) == (0, 20, 21)

    land(engine, plans[0])
    plans.append(start(engine))
    assert (only.num_computed, only.num_scheduled, only.num_tokens) == (16, 21, 22)
    land(engine, plans[1])
    assert only.output == [0] and only.pending == 1
    plans.append(start(engine))
    assert [plan.outputs for plan in plans] == [[-1], [0], [1], [2]]
    assert not start(engine).sequences, "the last token is on its way"
    for plan in plans[2:]:
        land(engine, plan)
    assert only.finish_reason == "length" and not engine.has_work


def test_only_what_has_landed_is_offered_to_others() -> None:
    engine = scheduler()
    engine.add(sequence([1] * 9))
    first = start(engine)
    engine.add(sequence([1] * 9))
    second = start(engine)
    assert planned(second)[1][1] == 9
    land(engine, first)
    land(engine, second)
    engine.add(sequence([1] * 9))
    assert planned(start(engine))[2][1] == 1


def test_a_preempted_sequence_waits_for_its_token_and_nobody_overtakes_it() -> None:
    engine = scheduler(num_pages=4)
    first, second, third = sequence([1] * 7), sequence([2] * 7), sequence([3])
    for each in (first, second, third):
        engine.add(each)
    land(engine, start(engine))
    flights = [start(engine), start(engine)]
    assert (second.status, second.pending) == (Status.WAITING, 1)
    engine.finish(first)
    assert not start(engine).sequences

    for flight in flights:
        land(engine, flight)
    assert second.output == [0, 0], "the pages were its own when the step began"
    plan = start(engine)
    assert planned(plan) == [(second, 5), (third, 1)], "a page of it was cached"
    land(engine, plan)
    drain(engine)
    assert len(second.output) == 4


def test_a_step_is_not_committed_to_pages_that_a_sequence_got_after_it_began() -> None:
    engine = scheduler(num_pages=14)
    first, slow = sequence([1] * 15, max_tokens=8), sequence([1] * 40)  # 4 and 10 pages
    engine.add(first)
    engine.add(slow)
    flights = [start(engine), start(engine)]
    land(engine, flights.pop(0))
    flights.append(start(engine))
    assert engine.stats.num_preemptions == 1
    assert slow in flights[1].admitted, "it needs fewer pages, now that some can be shared"

    land(engine, flights.pop(0))
    assert (slow.num_computed, slow.num_scheduled) == (12, 27)
    land(engine, flights.pop(0))
    assert slow.num_computed == 27
    drain(engine)


def test_siblings_start_though_their_leader_lost_its_pages_meanwhile() -> None:
    engine = scheduler(num_pages=4)
    first, leader, sibling = sequence([1] * 7), sequence([2] * 7, 1), sequence([2] * 7, 1)
    leader.followers = [sibling]
    engine.add(first)
    land(engine, start(engine))
    engine.add(leader)
    flights = [start(engine), start(engine)]
    assert leader in flights[0].admitted
    engine.finish(first)
    for flight in flights:
        land(engine, flight)
    assert leader.finish_reason == "length" and engine.waiting == [sibling]
    drain(engine)


@pytest.mark.parametrize("policy", ["max_utilization", "guaranteed_no_evict"])
def test_a_flood_of_later_requests_does_not_starve_a_large_one(policy: str) -> None:
    engine = scheduler(num_pages=8, scheduler_policy=policy)
    for _ in range(6):
        engine.add(sequence([1] * 5))
    large = sequence(list(range(28)), max_tokens=4)  # needs every page
    engine.add(large)
    for _ in range(40):
        engine.add(sequence([2, 3, 4]))
        step(engine)
    assert large.finish_reason == "length"


def test_max_tokens_is_clamped_to_the_room_after_the_prompt() -> None:
    engine = scheduler(num_pages=10)  # 40 tokens of 64
    assert engine.clamp_max_tokens(10, 5) == 5
    assert engine.clamp_max_tokens(10, None) == 31
    assert scheduler().clamp_max_tokens(60, 100) == 4
    assert engine.clamp_max_tokens(40, 1) == 1


@pytest.mark.parametrize("length", [0, 64, 100])
def test_an_impossible_prompt_is_refused(length: int) -> None:
    with pytest.raises(
        InvalidRequestError, match=f"has {length} tokens; this engine takes 1 to 63"
    ):
        scheduler().clamp_max_tokens(length, 1)


@pytest.mark.parametrize(("length", "max_tokens"), [(41, None), (41, 1), (30, 12)])
def test_what_can_never_fit_in_the_pages_is_refused(length: int, max_tokens: int | None) -> None:
    with pytest.raises(CapacityError, match=r"KV cache of 10 pages \(40 tokens\)"):
        scheduler(num_pages=10).clamp_max_tokens(length, max_tokens)


def test_a_prompt_whose_tokens_are_scored_is_computed_in_blocks() -> None:
    """Every scored token has a row of logits as wide as the vocabulary."""
    engine = scheduler(max_scored=6)
    scored, another, plain = (sequence(list(range(i, i + 10)), 1) for i in (0, 10, 20))
    for each in (scored, another):
        each.prompt_logprobs = [None]
    for each in (scored, another, plain):
        engine.add(each)

    assert planned(step(engine)) == [(scored, 6)], "nobody overtakes"
    assert planned(step(engine)) == [(scored, 4), (another, 2), (plain, 10)]
    assert planned(step(engine)) == [(another, 6)]
    assert planned(step(engine)) == [(another, 2)]


def test_the_siblings_of_one_request_leave_rows_to_others() -> None:
    engine = scheduler(num_pages=64, max_batch_size=8, max_num_tokens=16)
    leader = sequence([1, 2, 3], 8)
    leader.followers = [
        Sequence(leader.request, i, (0, leader.order[1], i), 8, 0) for i in range(1, 20)
    ]
    engine.add(leader)
    for _ in range(3):
        land(engine, engine.schedule())
    assert len(engine.running) == 7, "the leader and six of its siblings"
    other = sequence([4, 5], 2)
    engine.add(other)
    land(engine, engine.schedule())
    assert other.status is Status.RUNNING and len(engine.waiting) == 13
    while engine.has_work:
        land(engine, engine.schedule())
