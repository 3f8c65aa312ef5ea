"""A draft model, on the counting device, which checks what its pages hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.runtime.engine.driving import drain, greedy, tokens_of
from tests.runtime.engine.recording import recorded
from tests.runtime.engine.test_run_ahead_properties import STATES, windowed

from slipstream.builder.contract import Pooling
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.base import StartedStep
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import Request
from slipstream.runtime.speculation import draft
from slipstream.runtime.speculation.draft import DraftProposer
from slipstream.runtime.speculation.proposer import Context
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine, counting_tokenizer

DRAFT: dict[str, Any] = {
    "speculative": "draft",
    "speculative_model": "small",
    "num_speculative_tokens": 4,
}


def proposer(num_pages: int = 64, runs_ahead: bool = False, **options: Any) -> DraftProposer:  # noqa: ANN401
    small = counting_engine(num_pages, runs_ahead=runs_ahead, **options)
    return DraftProposer(counting_engine(runs_ahead=runs_ahead), small)


def counted(context: Context, most: int) -> list[int]:
    return [(context.tokens[-1] + 1 + i) % VOCAB_SIZE for i in range(most)]


def check(made: DraftProposer) -> None:
    held = [each.allocation for each in made._running.values() if each.allocation]
    made._kv.check_invariants(held)
    assert len(made._rows) + len(held) == made._config.max_batch_size


CALLS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True),
        st.lists(st.integers(0, 3), min_size=5, max_size=5),  # of the guess, so many were right
        st.integers(1, 4),
        st.none() | st.integers(0, 4),
    ),
    min_size=1,
    max_size=12,
)


@given(
    calls=CALLS, num_pages=st.integers(3, 20), budget=st.integers(3, 12), runs_ahead=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_it_says_what_the_model_says_whatever_came(
    calls: list[tuple[list[int], list[int], int, int | None]],
    num_pages: int,
    budget: int,
    runs_ahead: bool,
) -> None:
    limits = {"max_seq_len": 30, "max_batch_size": 3, "max_num_tokens": budget}
    made = proposer(num_pages, runs_ahead, page_size=3, **limits)
    contexts = [Context(list(range(i, 2 * i + 1)), i + 1) for i in range(5)]
    for asked, right, most, ended in calls:
        given = [contexts[i] for i in asked]
        guesses = made.propose(given, most)
        check(made)
        for place, context, guess in zip(asked, given, guesses, strict=True):
            assert guess in ([], counted(context, most))
            # What came otherwise is another token than the model says.
            context.tokens += [*guess[: right[place]], context.tokens[-1] + 2 + place]  # type: ignore[operator]
            context.tokens[-1] %= VOCAB_SIZE  # type: ignore[index]
        if ended is not None:
            made.finish(contexts[ended])
            contexts[ended] = Context([ended, 9], 2)
            check(made)
    for context in contexts:
        made.finish(context)
    check(made)
    assert made._kv.num_available == made._kv.num_pages


def test_what_was_computed_is_not_computed_again() -> None:
    made, computed = proposer(), list[int]()
    submit = made._executor.submit

    def counts(batch: StepBatch) -> StartedStep:
        computed.append(len(batch.token_ids))
        return submit(batch)

    with patch.object(made._executor, "submit", counts):
        tokens = list(range(20))
        context = Context(tokens, 20)
        assert made.propose([context], 3) == [[20, 21, 22]]
        tokens += [20, 21, 22, 23]
        made.propose([context], 3)
        tokens += [24, 40]
        made.propose([context], 3)
    assert computed == [20, 1, 1, 2, 1, 1, 1, 1, 1]


def test_who_was_asked_for_longest_ago_loses_its_pages() -> None:
    made = proposer(6, page_size=2, max_seq_len=12)
    first, second, third = (Context([i, i + 1], 2) for i in (0, 10, 20))
    assert made.propose([first, second], 2) == [[2, 3], [12, 13]]
    assert made.propose([first], 2) == [[2, 3]]
    assert made.propose([third], 4) == [[22, 23, 24, 25]]
    assert list(made._running) == [first, third]
    assert made.propose([second, third, first], 4) == [[], [22, 23, 24, 25], [2, 3, 4, 5]]


def test_there_is_no_guess_where_the_model_has_no_room_or_no_such_token() -> None:
    made = proposer(max_seq_len=8)
    assert made.propose([Context([1] * 5, 5), Context([1], 1)], 4) == [[], [2, 3, 4, 5]]
    assert made.propose([Context([1, VOCAB_SIZE], 2)], 4) == [[]]


def test_right_guesses_save_steps() -> None:
    loads = list[tuple[object, object]]()

    def load(path: object, options: object) -> LoadedEngine:
        loads.append((path, options))
        return counting_engine()

    with patch.object(draft, "load", load):
        loop, device = recorded(runs_ahead=False, **DRAFT)
    assert loads == [("small", {"enable_prefix_caching": False, "num_threads": None})]
    for number in range(3):
        loop.add_request(Request(str(number), [number * 9], greedy(max_tokens=11)))
    outputs = drain(loop)
    for number in range(3):
        assert tokens_of(outputs[str(number)]) == list(range(number * 9 + 1, number * 9 + 12))
    assert device.steps == 3
    made = loop._speculator._proposer  # type: ignore[union-attr]
    assert isinstance(made, DraftProposer) and not made._running
    small = made._executor
    loop.shutdown()
    assert isinstance(small, CountingExecutor) and small.closed, "its device is free again"


def test_a_model_must_be_named() -> None:
    with pytest.raises(InvalidRequestError, match="needs speculative_model"):
        EngineLoop(counting_engine(speculative="draft"))


def test_an_engine_that_cannot_guess_is_refused() -> None:
    small, tokenizer = counting_engine(), counting_tokenizer()
    tokenizer._backend.add_tokens(["another"])
    for other, complaint in (
        (replace(small, tokenizer=tokenizer), "tokenizer is another"),
        (
            replace(small, pooling=Pooling("embed", "last", True, 4, 9, "cosine", {}, None)),
            "makes no text",
        ),
        (counting_engine(runs_ahead=True), "for another device"),
        (replace(small, caches=(*small.caches, STATES)), "states, or windows"),
        (replace(small, caches=(*small.caches, windowed("near", 4))), "states, or windows"),
    ):
        with pytest.raises(EngineMismatchError, match=complaint):
            DraftProposer(counting_engine(), other)
