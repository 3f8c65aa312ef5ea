"""The loop with a device that runs ahead: what it starts and waits for, in which order."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from tests.runtime.engine.driving import drain, greedy
from tests.runtime.engine.recording import recorded

from slipstream.builder.contract import CacheArray, CacheSpec
from slipstream.errors import EngineMismatchError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.request import Request
from slipstream.runtime.testing import EOS


def test_the_next_step_starts_before_the_last_has_landed() -> None:
    loop, executor = recorded()
    loop.add_request(Request("a", [0], greedy()))
    drain(loop)
    assert executor.events == ["start", *["start", "land"] * 3, "land"]


def test_every_step_tells_what_it_waited_for() -> None:
    loop, _ = recorded()
    loop.add_request(Request("a", [0], greedy(max_tokens=9)))
    loop.add_request(Request("b", [7], greedy(max_tokens=3)))
    assert loop.step() == []
    told = [{o.request_id: len(o.outputs[0].token_ids) for o in loop.step()} for _ in range(9)]
    assert told == [{"a": i, "b": i} if i <= 3 else {"a": i} for i in range(1, 10)]
    assert not loop.has_work


def test_the_place_of_a_sequence_that_ends_is_taken_in_the_step_after() -> None:
    loop, executor = recorded(max_batch_size=1)
    for name in ("a", "b"):
        loop.add_request(Request(name, [0], greedy(max_tokens=2)))
    outputs = drain(loop)
    assert {name: o.outputs[0].token_ids for name, o in outputs.items()} == {
        "a": [1, 2],
        "b": [1, 2],
    }
    # The device waits where only the end of one sequence lets the next begin.
    turn = ["start", "start", "land", "land"]
    assert executor.events == turn * 2


def test_what_was_computed_after_the_end_is_ignored() -> None:
    loop, executor = recorded(page_size=2)
    loop.add_request(Request("a", [EOS - 3], greedy(max_tokens=9, logprobs=0)))
    output = drain(loop)["a"].outputs[0]
    assert output.token_ids == [EOS - 2, EOS - 1, EOS]
    assert len(output.logprobs or ()) == 3
    assert executor.steps == 4
    cached = loop.scheduler.kv.match([EOS - 3, EOS - 2, EOS - 1, EOS, 0, 0, 0])
    assert cached.depth == 1, "the end was computed, but only after it had ended"


@pytest.mark.parametrize(
    "params",
    [{"bad_words_token_ids": [[5, 6]]}, {"prompt_logprobs": 0}, {"logit_bias": {3: 1.0}}],
    ids=str,
)
def test_no_request_holds_up_the_device(params: dict[str, Any]) -> None:
    loop, executor = recorded()
    for index in range(3):
        loop.add_request(Request(f"free {index}", [index], greedy(max_tokens=8)))
    loop.step()
    loop.add_request(Request("special", [9, 9, 9], greedy(max_tokens=5, **params)))
    outputs = drain(loop)
    assert executor.events == ["start", *["start", "land"] * 7, "land"]
    assert outputs["special"].outputs[0].token_ids == [10, 11, 12, 13, 14]


def test_rows_are_sampled_when_the_host_knows_what_their_edits_need() -> None:
    loop, executor = recorded()
    loop.add_request(Request("free", [0], greedy(max_tokens=6)))
    loop.step()
    loop.add_request(Request("bad words", [0], greedy(max_tokens=2, bad_words_token_ids=[[5, 6]])))
    drain(loop)
    ahead = ["start", "sample", "land"]
    behind = ["start", "land", "sample"]
    assert executor.order == ["start", "sample", *behind * 3, *ahead * 2, "land"]


@pytest.mark.parametrize(
    "params", [{"prompt_logprobs": 0}, {"bad_words_token_ids": [[5, 6]]}], ids=str
)
def test_a_request_that_was_aborted_leaves_the_device_ahead(params: dict[str, Any]) -> None:
    loop, executor = recorded()
    loop.add_request(Request("other", [0], greedy()))
    loop.add_request(Request("gone", [1, 2, 3], greedy(**params)))
    loop.step()
    loop.abort("gone")
    loop.step()
    assert executor.events == ["start", "start", "land"]
    assert drain(loop)["other"].outputs[0].token_ids == [1, 2, 3, 4]


def test_a_head_that_is_refused_ends_its_step_alone() -> None:
    loop, executor = recorded()
    loop.add_request(Request("stopped", [EOS - 1], greedy(bad_words_token_ids=[[5, 6]])))
    loop.add_request(Request("struck", [0], greedy()))
    loop.step()
    executor.refuse_head = True
    outputs = drain(loop)
    assert outputs["stopped"].error is None
    assert "refused" in str(outputs["struck"].error)


def test_a_failure_spares_what_is_only_in_the_step_ahead() -> None:
    loop, executor = recorded(page_size=2)
    loop.add_request(Request("struck", [0], greedy(n=2)))
    executor.fail_next = True
    loop.step()
    loop.add_request(Request("spared", [5], greedy()))
    assert [output.request_id for output in loop.step()] == ["struck"]
    assert executor.steps == 2, "the step with both was on its way"
    outputs = drain(loop)
    assert outputs["spared"].error is None
    assert outputs["spared"].outputs[0].token_ids == [6, 7, 8, 9]


def test_the_step_before_a_failed_one_still_counts() -> None:
    loop, executor = recorded()
    loop.add_request(Request("short", [0], greedy(max_tokens=1)))
    loop.add_request(Request("stopped", [EOS - 1], greedy()))
    loop.add_request(Request("struck", [0], greedy()))
    loop.step()
    executor.fail_next = True
    outputs = drain(loop)
    assert [outputs[name].error is None for name in ("short", "stopped", "struck")] == [
        True,
        True,
        False,
    ]
    assert outputs["stopped"].outputs[0].token_ids == [EOS]
    assert outputs["struck"].outputs[0].token_ids == [1]


def test_the_step_before_a_refused_one_still_counts() -> None:
    loop, executor = recorded()
    loop.add_request(Request("stopped", [EOS - 1], greedy()))
    loop.add_request(Request("struck", [0], greedy()))
    loop.step()
    executor.refuse_next = True
    outputs = drain(loop)
    assert outputs["stopped"].error is None
    assert "refused" in str(outputs["struck"].error)
    assert executor.events == ["start", "land"]


def test_shutdown_waits_for_the_step_on_its_way() -> None:
    loop, executor = recorded()
    loop.add_request(Request("a", [0], greedy()))
    loop.step()
    loop.step()
    loop.shutdown()
    assert executor.events.count("start") == executor.events.count("land") == 2
    assert executor.closed


def test_shutdown_frees_the_device_although_its_cache_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, executor = recorded()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(f"{EngineLoop.__module__}.spill", full)
    with pytest.raises(OSError, match="no space left"):
        loop.shutdown()
    assert executor.closed


def test_a_device_that_guesses_takes_no_engine_with_states() -> None:
    states = CacheSpec("states", "state", (2,), (CacheArray("states", "int32", (1,)),))
    with pytest.raises(EngineMismatchError, match="guesses 3 tokens ahead, and of states"):
        recorded(more=(states,), draft_tokens=3)


class TestGuesses:
    """Of the host, which must know the tokens before."""

    def test_a_step_with_drafts_lands_before_the_next_starts(self) -> None:
        """The second step runs ahead; what it shows to pay begins in the third."""
        loop, executor = recorded(num_speculative_tokens=3, speculative="ngram")
        prompt = [*range(5, 15), *range(5, 8)]  # goes on to 14
        loop.add_request(Request("a", prompt, greedy(max_tokens=9)))
        output = drain(loop)["a"].outputs[0]
        assert output.token_ids == list(range(8, 17))
        landing = executor.events[3:]
        assert executor.events[:3] == ["start", "start", "land"]
        assert landing[:4] == ["land", "start", "land", "start"]
        drafts = loop.stats.speculation
        assert drafts is not None and drafts.num_accepted_tokens >= 4

    def test_a_device_is_never_idle_while_nothing_is_guessed(self) -> None:
        loop, executor = recorded(num_speculative_tokens=3, speculative="ngram")
        loop.add_request(Request("a", [0], greedy()))
        drain(loop)
        assert executor.events == ["start", *["start", "land"] * 3, "land"]

    def test_what_the_host_takes_meanwhile_is_part_of_the_cost(self) -> None:
        """A second passes whenever anyone looks at the clock."""
        loop, _ = recorded(speculative="ngram")
        taken, clock = list[float](), iter(range(1000))
        loop._clock = loop._steps._clock = lambda: float(next(clock))
        speculator = loop._speculator
        assert speculator is not None and speculator._lengths is not None
        costs = patch.object(
            speculator._lengths, "landed", lambda rows, seconds: taken.append(seconds)
        )
        chosen = patch.object(
            speculator._lengths, "choose", lambda count, chances, offered, most: list(offered)
        )
        loop.add_request(Request("a", [*range(5, 15), *range(5, 8)], greedy(max_tokens=9)))
        with costs, chosen:
            drain(loop)
        assert taken[0] < taken[-1]
