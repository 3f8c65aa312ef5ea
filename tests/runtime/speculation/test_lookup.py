"""Look-up of continuations, against a search of the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import given

from slipstream.runtime.speculation.lookup import OtherText, OwnText, RunIndex
from slipstream.runtime.speculation.ngram import NgramProposer
from slipstream.runtime.speculation.proposer import Context
from slipstream.runtime.testing import counting_engine

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def longest(tokens: Sequence[int]) -> int:
    """The end of the latest of the longest earlier runs that are the last tokens, 0 if shorter than
    two."""
    for size in range(len(tokens) - 1, 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return end
    return 0


@given(tokens=TEXTS)
def test_the_longest_run_is_found_and_the_latest_of_equals(tokens: list[int]) -> None:
    found, end = OwnText().propose(tokens, 1), longest(tokens)
    assert found == (tokens[end : end + 1] if end else [])


def test_a_copy_is_followed_for_as_long_as_it_agrees() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 9, 1, 2]
    text, tokens = OwnText(), list(prompt)
    for token in (3, 4, 5):
        assert text.propose(tokens, 2) == [token, token + 1]
        tokens.append(token)
    tokens.append(99)  # it is left,
    assert text.propose(tokens, 2) == []
    tokens += [6, 7]  # and found again
    assert text.propose(tokens, 2) == [9, 1]


def test_a_repetition_goes_on_beyond_its_end() -> None:
    assert OwnText().propose([5, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


@given(tokens=TEXTS, cut=st.integers(0, 14))
def test_a_text_that_grows_is_indexed_as_at_once(tokens: list[int], cut: int) -> None:
    grown, whole = RunIndex(), RunIndex()
    grown.extend(tokens[:cut])
    grown.extend(tokens)
    whole.extend(tokens)
    for end in range(len(tokens)):
        assert list(grown.before(end)) == list(whole.before(end))
    for first in range(3):
        for second in range(3):
            assert list(grown.places([first, second])) == list(whole.places([first, second]))


def test_what_is_tried_at_a_place_is_bounded() -> None:
    index = RunIndex()
    index.extend([7] * 10_000)
    assert len(list(index.before(9_999))) == 16


class TestPrediction:
    TEXT: ClassVar = [10, 11, 12, 13, 14, 15, 16, 17, 18, 10, 11, 30]

    def test_is_followed_from_its_beginning(self) -> None:
        text = OtherText(self.TEXT)
        assert text.propose([], 3) == [10, 11, 12]
        assert text.propose([10, 11], 3) == [12, 13, 14]

    def test_is_found_again_after_another_token(self) -> None:
        text = OtherText(self.TEXT)
        text.propose([10, 11], 3)
        assert text.propose([10, 11, 99], 3) == []
        assert text.propose([10, 11, 99, 13], 3) == [14, 15, 16]  # one token, near by

    def test_is_found_again_after_an_insertion_and_a_deletion(self) -> None:
        text = OtherText(self.TEXT)
        assert text.propose([10, 50, 51, 11, 12], 2) == [13, 14]
        assert text.propose([10, 50, 51, 11, 12, 16, 17], 2) == [18, 10]

    def test_the_nearest_of_equal_places_is_taken(self) -> None:
        text = OtherText([1, 2, 3, 0, 0, 0, 1, 2, 4])
        text.propose([], 1)
        assert text.propose([9, 1, 2], 1) == [3]

    def test_has_an_end(self) -> None:
        text = OtherText(self.TEXT)
        assert text.propose(self.TEXT, 4) == []
        assert OtherText([]).propose([1], 4) == []

    @given(text=TEXTS, output=TEXTS)
    def test_gives_what_stands_there(self, text: list[int], output: list[int]) -> None:
        follower = OtherText(text)
        for size in range(len(output) + 1):
            found = follower.propose(output[:size], 4)
            ends = [i for i in range(len(text) + 1) if text[i : i + 4][: len(found)] == found]
            assert ends and len(found) <= 4


def test_ngram_keeps_a_place_for_every_context() -> None:
    proposer = NgramProposer(counting_engine())
    contexts = [Context([1, 2, 3, 1, 2], 5), Context([1, 2, 4, 1, 2], 5), Context([1], 1)]
    assert proposer.propose(contexts, 1) == [[3], [4], []]


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_an_edited_text_is_mostly_guessed(share: float) -> None:
    random = Random(0)
    text = [random.randrange(200) for _ in range(600)]
    edited = [random.randrange(200) if random.random() < share else token for token in text]
    follower, right = OtherText(text), 0
    for size in range(len(edited)):
        right += follower.propose(edited[:size], 1) == edited[size : size + 1]
    assert right >= (1 - 2.5 * share) * len(text)
