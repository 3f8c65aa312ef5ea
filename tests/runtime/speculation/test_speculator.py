"""Whose guess is verified, and what an engine refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.runtime.engine.driving import drain, greedy, tokens_of
from tests.runtime.engine.recording import recorded
from tests.runtime.engine.test_run_ahead_properties import STATES
from tests.runtime.speculation.hostile import NAME, HostileProposer, hostile

from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.base import StartedStep
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.request_factory import RequestFactory
from slipstream.runtime.speculation import proposer
from slipstream.runtime.speculation.proposer import Context
from slipstream.runtime.testing import counting_engine

ALPHABET = list(range(26))


def answer(loop: EngineLoop, **params: Any) -> RequestOutput:  # noqa: ANN401
    """To a prompt that counts twice from 0, so that look-up is right."""
    prompt = [*ALPHABET, 60, *ALPHABET[:3]]
    loop.add_request(Request("r", prompt, greedy(**{"max_tokens": 16, **params})))
    return drain(loop)["r"]


def test_right_guesses_save_steps() -> None:
    loop, device = recorded(runs_ahead=False, speculative="ngram", num_speculative_tokens=7)
    output = answer(loop)
    assert tokens_of(output) == list(range(3, 19))
    assert device.steps == 3  # one, then 8, then the rest
    stats = loop.stats.speculation
    assert stats is not None
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (2, 13, 13)
    assert stats.accepted_per_position == (2, 2, 2, 2, 2, 2, 1)
    assert output.accepted_prediction_tokens == 0


def test_a_request_may_do_without() -> None:
    loop, device = recorded(runs_ahead=False, speculative="ngram", num_speculative_tokens=7)
    assert tokens_of(answer(loop, speculative=False)) == list(range(3, 19))
    assert device.steps == 16 and loop.stats.speculation.num_drafts == 0  # type: ignore[union-attr]


def test_nothing_is_guessed_unless_asked() -> None:
    loop, device = recorded(runs_ahead=False)
    answer(loop)
    assert device.steps == 16 and loop.stats.speculation is None


def test_a_prediction_is_followed_before_the_proposer_is_asked() -> None:
    loop, device = recorded(runs_ahead=False, speculative="ngram", num_speculative_tokens=3)
    text = [*range(3, 8), 40, *range(9, 30)]  # one token is not what comes
    loop.add_request(Request("r", [1, 2], greedy(max_tokens=16, prediction_token_ids=text)))
    output = drain(loop)["r"]
    assert tokens_of(output) == list(range(3, 19))
    assert device.steps < 9
    assert output.accepted_prediction_tokens > 8 and output.rejected_prediction_tokens > 0


@pytest.mark.parametrize(("seconds_a_row", "rows"), [(0.0, 8), (0.05, 1)])
def test_as_many_as_pay_are_verified_by_what_steps_cost(seconds_a_row: float, rows: int) -> None:
    engine = counting_engine(speculative="ngram", max_seq_len=1024, num_pages=400)
    now, seen = 0.0, list[int]()
    loop = EngineLoop(engine, clock=lambda: now)
    submit = engine.executor.submit

    def timed(batch: StepBatch) -> StartedStep:
        nonlocal now
        seen.append(len(batch.token_ids))
        now += 0.001 + seconds_a_row * len(batch.token_ids)
        return submit(batch)

    engine.executor.submit = timed  # type: ignore[method-assign]
    output = answer(loop, max_tokens=300, ignore_eos=True)
    assert len(tokens_of(output)) == 300
    assert max(set(seen[-20:]), key=seen[-20:].count) == rows


class Broken(HostileProposer):
    def propose(self, contexts: Any, most: int) -> list[list[int]]:  # noqa: ANN401
        raise RuntimeError("no guess")


def test_a_proposer_that_raises_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    places = {"broken": f"{__name__}:Broken"}
    monkeypatch.setattr(proposer, "entry_points", lambda group: places)
    loop, device = recorded(runs_ahead=False, speculative="broken", num_speculative_tokens=3)
    assert tokens_of(answer(loop)) == list(range(3, 19))
    assert device.steps == 16 and len(caplog.records) == 1


def test_an_installed_proposer_is_found_by_its_name() -> None:
    with hostile():
        loop, device = recorded(runs_ahead=False, speculative=NAME, num_speculative_tokens=3)
        assert tokens_of(answer(loop)) == list(range(3, 19))
        assert device.steps < 16


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"speculative": "guess"}, "known are off, .*ngram"),
        ({"speculative": "ngram", "num_speculative_tokens": 8}, "verifies up to 7"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        EngineLoop(counting_engine(**options))


@pytest.mark.parametrize("count", [0, "all", 1.5])
def test_a_number_of_drafts_is_checked(count: Any) -> None:  # noqa: ANN401
    with pytest.raises(InvalidRequestError, match="num_speculative_tokens"):
        counting_engine(num_speculative_tokens=count)


def test_a_device_that_verifies_nothing_is_refused() -> None:
    with pytest.raises(EngineMismatchError, match="verifies no drafts"):
        EngineLoop(counting_engine(speculative="ngram", draft_tokens=1))


def test_states_are_refused() -> None:
    engine = counting_engine(speculative="ngram")
    with pytest.raises(EngineMismatchError, match="states"):
        EngineLoop(replace(engine, caches=(*engine.caches, STATES)))


class Wrong(HostileProposer):
    """The counting model never says the same token twice."""

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        return [[context.tokens[-1]] * most for context in contexts]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(proposer, "entry_points", lambda group: {"wrong": f"{__name__}:Wrong"})
    return "wrong"


def test_nobody_is_preempted_for_a_guess(wrong: str) -> None:
    loop, _ = recorded(
        3, runs_ahead=False, page_size=3, speculative=wrong, num_speculative_tokens=4
    )
    # The guesses after the first want the page that the second needs a step later.
    loop.add_request(Request("first", [1], greedy(max_tokens=8)))
    loop.add_request(Request("second", [1, 2], greedy(max_tokens=3)))
    outputs = drain(loop)
    assert tokens_of(outputs["first"]) == list(range(2, 10))
    assert tokens_of(outputs["second"]) == [3, 4, 5]
    stats = loop.stats
    assert stats.num_preemptions == 0
    assert stats.speculation is not None and stats.speculation.num_draft_tokens > 8


@pytest.mark.parametrize(
    ("params", "last", "drafts"),
    [
        ({"max_tokens": 5}, 7, 3),
        ({"stop_token_ids": [6]}, 6, 2),  # guesses end before what ends the sequence
        ({"stop": ["fg"]}, 6, 7),
    ],
)
def test_a_run_ends_where_the_sequence_does(params: dict[str, Any], last: int, drafts: int) -> None:
    loop, _ = recorded(runs_ahead=False, speculative="ngram", num_speculative_tokens=7)
    output = answer(loop, **params)
    assert tokens_of(output) == list(range(3, last + 1))
    stats = loop.stats.speculation
    assert stats is not None and stats.num_draft_tokens == drafts


def test_a_request_is_aborted_while_its_drafts_are_on_their_way() -> None:
    loop, _ = recorded(runs_ahead=False, speculative="ngram", num_speculative_tokens=7)
    loop.add_request(Request("r", [*ALPHABET, 60, *ALPHABET[:3]], greedy(max_tokens=16)))
    while not loop.scheduler.running or not loop.scheduler.running[0].num_drafted:
        loop.step()
    loop.abort("r")
    assert drain(loop)["r"].outputs[0].finish_reason == "abort"


@pytest.mark.parametrize(
    ("config", "speculative", "kept"),
    [("ngram", True, (1, 2, 3)), ("ngram", False, ()), ("off", True, ())],
)
def test_a_prediction_is_kept_where_somebody_looks_at_it(
    config: str, speculative: bool, kept: tuple[int, ...]
) -> None:
    factory = RequestFactory(counting_engine(speculative=config, max_seq_len=8))
    params = greedy(prediction="bcd", speculative=speculative)
    request = factory.request("a", params, output_kind="final")
    assert tuple(request.params.prediction_token_ids) == kept
    params = replace(params, prediction="b" * 4000)
    if kept:
        with pytest.raises(InvalidRequestError, match="prediction has at least"):
            factory.request("a", params, output_kind="final")
    else:
        factory.request("a", params, output_kind="final")
