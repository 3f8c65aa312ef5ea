"""Look-up in the outputs of others."""

from __future__ import annotations

from typing import Any

from tests.runtime.engine.driving import drain, greedy, tokens_of
from tests.runtime.engine.recording import recorded

from slipstream.runtime.request import Request
from slipstream.runtime.speculation.proposer import Context
from slipstream.runtime.speculation.suffix import EarlierOutputs, SuffixProposer
from slipstream.runtime.testing import counting_engine


def test_the_longer_run_counts_and_a_sequence_itself_where_they_are_equal() -> None:
    proposer = SuffixProposer(counting_engine())
    proposer.finish(Context([0, 5, 6, 7, 8, 9], 1))
    other = [Context([1, 6, 7, 8], 2), Context([7, 8, 1, 6, 7, 8], 2)]
    assert proposer.propose(other, 2) == [[9], [9]]
    assert proposer.propose([Context([6, 7, 8, 1, 6, 7, 8], 2)], 2) == [[1, 6]]


def test_what_followed_last_is_guessed_and_ends_with_its_output() -> None:
    outputs = EarlierOutputs(2, 8, 100)
    outputs.add("", [1, 2, 3, 4])
    outputs.add("", [1, 2, 5])
    assert outputs.find("", [9, 1, 2], 3) == (2, [5])
    outputs.add("", [0, 1, 2, 3])
    assert outputs.find("", [0, 1, 2], 3) == (3, [3])
    assert outputs.find("", [4, 1], 3) == (0, [])
    assert outputs.find("", [1], 3) == (0, [])


def test_namespaces_hear_nothing_of_each_other() -> None:
    outputs = EarlierOutputs(2, 8, 100)
    outputs.add("one", [1, 2, 3])
    assert outputs.find("other", [1, 2], 3) == (0, [])
    assert outputs.find("one", [1, 2], 3) == (2, [3])


def test_no_more_is_kept_than_what_may_be() -> None:
    outputs = EarlierOutputs(2, 8, 60)
    for first in range(0, 1000, 10):
        outputs.add("", list(range(first, first + 9)))
        kept = [len(texts._tokens) for each in outputs._generations for texts in each.values()]
        assert sum(kept) <= 60
        assert outputs.find("", [first, first + 1], 3) == (2, [first + 2, first + 3, first + 4])
    assert outputs.find("", [0, 1], 3) == (0, [])
    outputs.add("", list(range(5000, 6000)))  # its end is
    assert outputs.find("", [5997, 5998], 3) == (2, [5999])
    assert outputs.find("", [5100, 5101], 3) == (0, [])


def steps(salts: tuple[str, str], **params: Any) -> int:  # noqa: ANN401
    """Of the second of two requests with the same answer, which stands in neither prompt."""
    loop, device = recorded(runs_ahead=False, speculative="suffix", num_speculative_tokens=7)
    for number, salt in enumerate(salts):
        before = device.steps
        request = Request(
            str(number), [number, 20], greedy(max_tokens=16, **params), cache_namespace=salt
        )
        loop.add_request(request)
        assert tokens_of(drain(loop)[str(number)]) == list(range(21, 37))
    return device.steps - before


def test_an_answer_that_was_given_before_takes_fewer_steps() -> None:
    assert steps(("", "")) < 8
    assert steps(("mine", "yours")) == 16
    assert steps(("", ""), speculative=False) == 16
