"""Prompts beside streams: by time, on devices whose steps cost what a model says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.engine.timed_device import Load, percentile

from slipstream.errors import InvalidRequestError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.prompt_share import PromptShare, StepTimes


def ratio(load: Load) -> float:
    """Of the 99th percentile of times between two tokens and the median."""
    return percentile(load.gaps, 0.99) / percentile(load.gaps, 0.5)


def later_rate(load: Load) -> float:
    """Requests a second once a load has lasted for some seconds."""
    late = [time for time in load.ended if time > 8]
    return len(late) / (late[-1] - 8)


def test_chats_that_arrive_do_not_hold_up_streams_nor_cost_throughput() -> None:
    """An 8B on an H100 by a model of its costs: 64 chats of 2,000 tokens a second."""
    without, bounded = Load(streams=False), Load(streams=True)
    rate = without.run(128, 768, (512, 128), chats=64)
    kept = bounded.run(128, 768, (512, 128), chats=64)

    assert ratio(without) > 4, "or there was nothing to bound"
    assert ratio(bounded) <= 2
    assert kept >= 0.95 * rate
    assert percentile(bounded.first["chat"], 0.5) < 0.25


def test_streams_that_begin_together_are_even() -> None:
    """The first of them are held to the pace of all, not to that of the few that speak yet."""
    load = Load(streams=True)
    load.run(256, 512, (512, 256))
    assert ratio(load) <= 2
    few = [step for step in load.device.steps if 16 < step[0] < 64][:20]
    alone = [2.9e-3 + decodes * (12.5e-6 + 512 * 44.7e-9) for decodes, _, _ in few]
    assert sum(seconds for _, _, seconds in few) > 2.5 * sum(alone)
    assert max(seconds for decodes, _, seconds in load.device.steps if decodes) < 0.04


def test_few_streams_are_even_beside_prompts() -> None:
    load = Load(streams=True)
    load.run(2, 24, (2000, 100))
    assert ratio(load) <= 2.5


def test_more_prompts_than_half_the_time_takes_are_still_computed() -> None:
    """Prompts that take four fifths of the device: long ones with short answers."""
    without, bounded = Load(streams=False), Load(streams=True)
    for load in (without, bounded):
        load.run(32, 512, (2000, 24))
    rate, kept = (later_rate(load) for load in (without, bounded))
    assert kept >= 0.95 * rate
    assert ratio(bounded) < ratio(without)


def test_seconds_after_a_queue_are_none_of_it() -> None:
    """Those who waited have gone, and nothing waits while streams go on: what comes then is bounded
    as if there never had been a queue."""
    load = Load(streams=True)
    for seed in range(8):
        load.ask([seed] * 200, 3000)
    while len(load.heard) < 8:
        load.step()
    load.ask([9] * 2000, 1, "chat")  # from which it is learned what prompts take
    while len(load.heard) < 9:
        load.step()
    for seed in range(10, 50):
        load.ask([seed] * 3000, 1, "chat")
    load.step()
    for number in range(9, 49):
        load.loop.abort(f"chat {number}")
    later = load.clock.now + 8
    while load.clock.now < later:
        load.step()
    usual = load.device.steps[-1]
    assert usual[:2] == (8, 0), "or something waits"
    load.ask([50] * 3000, 1, "chat")
    load.step(), load.step()
    assert max(seconds for *_, seconds in load.device.steps[-2:]) < 2.2 * usual[2]


@pytest.mark.parametrize("load", [Load(streams=False), Load(streams=True, kind="final")])
def test_without_streams_steps_are_as_large_as_they_may_be(load: Load) -> None:
    load.run(64, 128, (512, 32))
    assert max(prompts for _, prompts, _ in load.device.steps) > 8000
    assert any(decodes and prompts > 4000 for decodes, prompts, _ in load.device.steps)


@settings(max_examples=30, deadline=None)
@given(
    fixed=st.floats(1e-4, 0.02),
    decode=st.floats(1e-6, 1e-4),
    prompt=st.floats(5e-6, 1e-3),
    seed=st.integers(0, 1 << 16),
)
def test_what_steps_take_is_learned_whatever_the_device(
    fixed: float, decode: float, prompt: float, seed: int
) -> None:
    rng, times = random.Random(seed), StepTimes()
    for index in range(600):
        decodes = rng.randrange(1, 64)
        prompts = rng.choice((0, 0, rng.randrange(16, 600)))
        seconds = fixed + decode * decodes + prompt * prompts
        # Now and then a step waits for something else.
        times.add(decodes, prompts, 30.0 if index in (0, 150) else seconds)

    expected = fixed + 32 * decode
    assert times.of_decodes(32) == pytest.approx(expected, rel=0.3, abs=60 * prompt)
    assert times.of_prompt_token == pytest.approx(prompt, rel=0.3, abs=expected / 200)


def learned(share: PromptShare) -> PromptShare:
    """5 ms, 10 us a decode and 20 us for a token of a prompt."""
    rng = random.Random(0)
    for _ in range(600):
        decodes, prompts = rng.randrange(1, 64), rng.choice((0, rng.randrange(600)))
        share.landed(decodes, prompts, 5e-3 + 10e-6 * decodes + 20e-6 * prompts, False)
    return share


def test_nothing_is_bounded_before_a_prompt_was_seen() -> None:
    share = PromptShare()
    assert share.most(1, 1, 1, 1000) is None
    share.landed(1, 0, 0.005, False)
    assert share.most(1, 1, 1, 1000) is None
    assert learned(share).most(1, 1, 1, 10_000) is not None


def bound(share: PromptShare, speaking: int, silent: int, waiting: int = 50_000) -> float:
    """The seconds that a step of one token a sequence takes with all the prompts it may have."""
    most = share.most(speaking, speaking, silent, waiting)
    assert most is not None
    return 5e-3 + 10e-6 * speaking + 20e-6 * most


def test_a_step_takes_twice_as_long_as_it_will_without_prompts() -> None:
    share = learned(PromptShare())
    for speaking, silent in ((32, 1), (32, 16), (64, 64), (4, 300)):
        usual = 5e-3 + 10e-6 * (speaking + silent)
        assert bound(share, speaking, silent) == pytest.approx(2 * usual, rel=0.1)


def test_a_queue_that_lasts_gets_more_time() -> None:
    share, found = learned(PromptShare()), []
    for _ in range(1000):
        found.append(bound(share, 32, 8))
        share.landed(32, 300, 5e-3 + 10e-6 * 32 + 20e-6 * 300, share.is_queue(50_000))
    assert found[300] == pytest.approx(found[0], rel=0.02), "3.4 s are a burst"
    assert found[600] > 2 * found[0]
    for _ in range(2000):
        assert share.most(32, 32, 1, 500) is not None
        share.landed(32, 0, 5e-3 + 10e-6 * 32, share.is_queue(500))
    assert bound(share, 32, 8) == pytest.approx(found[0], rel=0.1), "it was over"


def test_a_step_is_filled_to_the_size_that_it_is_padded_to() -> None:
    exact, padded = learned(PromptShare()), learned(PromptShare((64, 128, 256, 512, 1024)))
    most, filled = exact.most(32, 32, 8, 5_000), padded.most(32, 32, 8, 5_000)
    assert most is not None and filled is not None
    assert filled <= most and filled + 32 in (128, 256, 512)
    assert padded.most(32, 32, 8, 40) == exact.most(32, 32, 8, 40), "all that waits is less"


@pytest.mark.parametrize("wrong", [0, -1, "all"])
def test_a_bound_is_a_number_or_auto(wrong: object) -> None:
    with pytest.raises(InvalidRequestError, match="max_prefill_tokens is"):
        RuntimeConfig().override({"max_prefill_tokens": wrong})
