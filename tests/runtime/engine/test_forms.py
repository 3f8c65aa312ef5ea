"""Sequences held to a form, on the counting model: the next letter on that the form allows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.runtime.engine.driving import GRAMMARS, drain, greedy
from tests.runtime.engine.recording import Recorder, recorded
from tests.runtime.engine.test_run_ahead_properties import Arrival, run, same
from tests.runtime.speculation.hostile import NAME

from slipstream.errors import InvalidRequestError
from slipstream.runtime.request import CompletionOutput, Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import EOS


def request(form: dict[str, Any], name: str = "r", **params: Any) -> Request:  # noqa: ANN401
    chosen = greedy(**{"max_tokens": 40, "structured": form, **params})
    assert chosen.structured is not None
    return Request(name, [0], chosen, grammar=GRAMMARS.compile(chosen.structured))


def answer(
    form: dict[str, Any],
    *,
    jumps: bool = True,
    runs_ahead: bool = False,
    **params: Any,  # noqa: ANN401
) -> tuple[CompletionOutput, Recorder]:
    loop, device = recorded(runs_ahead=runs_ahead, enable_jump_decoding=jumps)
    loop.add_request(request(form, **params))
    (output,) = drain(loop).values()
    assert output.error is None
    return output.outputs[0], device


class TestEndings:
    @pytest.mark.parametrize("jumps", [True, False])
    def test_a_complete_form_ends_it_without_a_token_for_that(self, jumps: bool) -> None:
        (done, _) = answer({"regex": "[f-h]{3}"}, jumps=jumps)
        assert (done.text, done.finish_reason, done.stop_reason) == ("fgh", "stop", None)
        assert EOS not in done.token_ids

    @pytest.mark.parametrize("ignore_eos", [False, True])
    def test_the_end_may_be_sampled_where_the_form_allows_it(self, ignore_eos: bool) -> None:
        # After "z" the counting model goes on to "A", which the form forbids, to the end's token.
        (done, _) = answer({"regex": "[x-z]*"}, ignore_eos=ignore_eos)
        assert (done.text, done.token_ids[-1], done.finish_reason) == ("xyz", EOS, "stop")

    def test_a_form_ends_before_min_tokens(self) -> None:
        (done, _) = answer({"choice": ["bb"]}, min_tokens=20)
        assert (done.text, done.finish_reason) == ("bb", "stop")

    def test_tokens_may_run_out_in_the_middle(self) -> None:
        (done, _) = answer({"choice": ["hello"]}, max_tokens=3)
        assert (done.text, done.finish_reason) == ("hel", "length")

    @pytest.mark.parametrize("jumps", [True, False])
    def test_stop_strings_and_tokens_end_what_is_forced(self, jumps: bool) -> None:
        (done, _) = answer({"choice": ["hello world"]}, jumps=jumps, stop=["o w"])
        assert (done.text, done.stop_reason) == ("hell", "o w")
        (done, _) = answer({"choice": ["hello world"]}, jumps=jumps, stop_token_ids=[14])
        assert (done.text, done.stop_reason) == ("hell", 14)

    def test_a_form_that_becomes_too_complex_ends_its_request_only(self) -> None:
        loop, _ = recorded()
        broken = request({"regex": "[a-z]{20}"}, "broken")
        loop.add_request(broken)
        loop.add_request(request({"regex": "[a-z]{20}"}, "other"))
        for _ in range(3):
            loop.step()
        (constraint,) = [
            s.constraint for s in loop.scheduler.running if s.request is broken and s.constraint
        ]
        constraint.matcher.consume_token(EOS)  # which is not allowed: it fails for good
        outputs = drain(loop)
        error = outputs["broken"].error
        assert isinstance(error, InvalidRequestError) and error.param == "structured"
        assert outputs["other"].outputs[0].finish_reason == "stop"


class TestForcedTokens:
    TEXT = "The quick brown fox"

    @pytest.mark.parametrize("runs_ahead", [False, True])
    def test_take_no_step_each(self, runs_ahead: bool) -> None:
        form = {"grammar": f'start: /[a-c]/ "{self.TEXT}" /[x-z]/'}
        with_jumps, fast = answer(form, runs_ahead=runs_ahead)
        without, slow = answer(form, runs_ahead=runs_ahead, jumps=False)
        assert with_jumps == without
        assert with_jumps.text[1:-1] == self.TEXT and with_jumps.finish_reason == "stop"
        # A step for what is sampled, twice; after each, one more was on its way.
        assert fast.steps == 2 * (1 + runs_ahead)
        assert slow.steps >= len(with_jumps.token_ids)

    def test_are_scored_one_by_one_where_log_probabilities_are_wanted(self) -> None:
        done, device = answer({"choice": ["hello"]}, logprobs=0)
        assert done.logprobs is not None
        assert [each.token_id for each in done.logprobs] == done.token_ids
        assert device.steps == 5

    def test_stay_within_the_budget_of_a_step(self) -> None:
        loop, device = recorded(max_num_tokens=4, max_batch_size=2)
        for name in "ab":
            form = {"grammar": 'start: /[a-c]/ "abcdefghijklmnop" /[x-z]/'}
            loop.add_request(request(form, name))
        largest = 0
        submit = device.submit

        def counted(batch: Any) -> Any:  # noqa: ANN401
            nonlocal largest
            largest = max(largest, len(batch.token_ids))
            return submit(batch)

        device.submit = counted  # type: ignore[method-assign]
        outputs = drain(loop)
        assert largest == 4
        assert {o.outputs[0].finish_reason for o in outputs.values()} == {"stop"}

    def test_are_no_prompt_that_others_go_before(self) -> None:
        """A long prompt that is being computed takes what a step leaves, not their place."""
        loop, _ = recorded(max_num_tokens=16, max_batch_size=2, num_pages=200)
        loop.add_request(request({"grammar": 'start: /[a-c]/ "abcdefgh" /[x-z]/'}, "form"))
        loop.add_request(Request("book", [1] * 200, greedy(max_tokens=2)))
        told: list[str] = []
        while "form" not in told:
            told += [o.request_id for o in loop.step() if o.finished]
        assert loop.scheduler.running[0].num_scheduled < 100
        drain(loop)


def test_other_rows_run_ahead_of_one_with_a_form() -> None:
    """The layers of the next step are started before the last has landed, always."""
    loop, device = recorded(runs_ahead=True)
    loop.add_request(request({"regex": "[a-z]{9}"}, "form"))
    loop.add_request(Request("plain", [3], greedy(max_tokens=9)))
    drain(loop)
    between = device.events[1:-1]
    assert between.count("start") == between.count("land")
    assert ("land", "land") not in pairwise(between)


FORMS: list[dict[str, Any] | None] = [
    None,
    {"regex": "[a-f]{2,7}"},
    {"choice": ["abcdefgh", "abcx", "q"]},
    {"grammar": 'start: "b" (/[c-e]/ "hello")* "!"'},
    {"regex": "a*"},
]


@st.composite
def params_with_forms(draw: st.DrawFn) -> SamplingParams:
    form = draw(st.sampled_from(FORMS))
    return SamplingParams(
        n=draw(st.integers(1, 3)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(2, 16)),
        min_tokens=draw(st.sampled_from([0, 0, 2])),
        ignore_eos=draw(st.booleans()),
        stop=draw(st.sampled_from([(), (), ["de"], ["lo"]])),
        stop_token_ids=draw(st.lists(st.integers(0, 12), max_size=1)),
        logprobs=draw(st.sampled_from([None, None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        bad_words_token_ids=draw(st.sampled_from([(), (), [[3]], [[1, 2]]])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        structured=None if form is None else StructuredOutput(**form),
    )


WORKLOADS = st.lists(
    st.builds(
        Arrival,
        after_steps=st.integers(0, 4),
        prompt=st.lists(st.sampled_from([0, 1, EOS - 5]), min_size=1, max_size=10),
        params=params_with_forms(),
        priority=st.integers(0, 1),
        abort_after=st.sampled_from([None, None, None, 0, 3, 7]),
    ),
    min_size=1,
    max_size=6,
)


def made(workload: list[Arrival], **options: Any) -> dict[str, Any]:  # noqa: ANN401
    loop, _ = recorded(page_size=3, max_seq_len=27, max_batch_size=3, **options)
    return run(loop, workload, GRAMMARS)


@given(
    workload=WORKLOADS,
    num_pages=st.integers(4, 14),
    budget=st.integers(3, 12),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    caching=st.booleans(),
    runs_ahead=st.booleans(),
    draft_tokens=st.sampled_from([0, 0, 2]),
    guesses=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_jumping_running_ahead_and_preemption_change_no_answer(
    workload: list[Arrival],
    num_pages: int,
    budget: int,
    policy: str,
    caching: bool,
    runs_ahead: bool,
    draft_tokens: int,
    guesses: bool,
) -> None:
    shared: dict[str, Any] = {
        "max_num_tokens": budget,
        "scheduler_policy": policy,
        "enable_prefix_caching": caching,
    }
    plain = made(
        workload, num_pages=num_pages, runs_ahead=False, **shared, enable_jump_decoding=False
    )
    device: dict[str, Any] = {"runs_ahead": runs_ahead, "draft_tokens": draft_tokens}
    if guesses:
        device = {"runs_ahead": False, "speculative": NAME, "num_speculative_tokens": 4}
    other = made(workload, num_pages=num_pages, **device, **shared)
    assert plain.keys() == other.keys()
    for request_id, output in other.items():
        assert output.error is None and output.finished
        assert all(map(same, output.outputs, plain[request_id].outputs))


def test_a_form_must_have_been_compiled() -> None:
    loop, _ = recorded()
    with pytest.raises(AssertionError, match="compiled before"):
        loop.add_request(Request("r", [0], greedy(structured={"json_object": True})))
