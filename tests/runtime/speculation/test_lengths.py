"""How many drafts are verified, on devices whose steps cost what the tests say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from slipstream.runtime.speculation.lengths import Lengths, StepCosts
from slipstream.runtime.speculation.proposer import Guessed

Cost = Callable[[int], float]


def compute_bound(rows: int) -> float:
    return 1.0 * rows


def memory_bound(rows: int) -> float:
    return 1.0 + 0.02 * rows


def drive(
    cost: Cost,
    chance: float,
    *,
    sequences: int = 1,
    steps: int = 400,
    lengths: Lengths | None = None,
    asking: float = 0.0,
) -> tuple[list[int], float]:
    """The rows of every step and the tokens a second that are to be expected of them."""
    lengths, rows, tokens, seconds = lengths or Lengths(7), list[int](), 0.0, 0.0
    for _ in range(steps):
        wanted = lengths.wanted()
        if wanted:  # it takes as long for every token
            lengths.asked(wanted, asking * wanted)
            seconds += asking * wanted
        counts = lengths.choose(sequences, [chance] * sequences, [wanted] * sequences, 512)
        rows.append(sequences + sum(counts))
        tokens += sum(sum(chance**i for i in range(count + 1)) for count in counts)
        seconds += cost(rows[-1])
        lengths.landed(rows[-1], cost(rows[-1]))
    return rows, tokens / seconds


def test_all_are_verified_where_rows_cost_little() -> None:
    rows, rate = drive(memory_bound, 0.95)
    assert rows.count(8) > 0.9 * len(rows)
    assert rate > 4 * 1 / memory_bound(1)


@pytest.mark.parametrize("sequences", [1, 8, 64])
def test_none_are_where_a_row_costs_a_step(sequences: int) -> None:
    rows, rate = drive(compute_bound, 0.6, sequences=sequences)
    assert rows.count(sequences) > 0.98 * len(rows)
    assert rate > 0.99 * sequences / compute_bound(sequences)


def test_none_are_where_guesses_are_wrong() -> None:
    rows, _ = drive(memory_bound, 0.01)
    assert set(rows) == {1}


def test_the_length_follows_the_chance() -> None:
    def cost(rows: int) -> float:
        return 1 + 0.2 * (rows - 1)

    means = []
    for chance in (0.3, 0.6, 0.9):
        rows, _ = drive(cost, chance)
        means.append(sum(rows) / len(rows))
    assert means[0] < means[1] < means[2]


def test_a_length_that_becomes_dear_is_left_and_found_again() -> None:
    lengths = Lengths(7)
    drive(memory_bound, 0.8, lengths=lengths)
    rows, _ = drive(compute_bound, 0.8, lengths=lengths, steps=600)
    assert rows[-100:].count(1) > 95
    rows, _ = drive(memory_bound, 0.8, lengths=lengths, steps=600)
    assert rows[-100:].count(8) > 90


def test_drafts_go_where_they_are_most_likely_right() -> None:
    lengths = Lengths(7)
    drive(lambda rows: 1 + 0.1 * rows, 0.9, sequences=2, lengths=lengths)
    counts = lengths.choose(2, [0.95, 0.05], [7, 7], 512)
    assert counts[0] > 3 and counts[1] == 0


def test_a_budget_holds() -> None:
    lengths = Lengths(7)
    drive(memory_bound, 0.9, sequences=2, lengths=lengths)
    assert sum(lengths.choose(2, [0.9, 0.9], [7, 7], 5)) <= 5
    assert lengths.choose(2, [0.9, 0.9], [0, 0], 5) == [0, 0]


def test_nothing_is_verified_before_a_step_was_measured() -> None:
    assert Lengths(7).choose(1, [0.9], [7], 512) == [0]


def test_costs_between_two_that_are_known() -> None:
    costs = StepCosts()
    costs.add(1, 1.0, sure=True)
    assert costs.seconds(8) == 1.0  # what is not known is tried
    costs.add(8, 8.0, sure=True)
    assert costs.seconds(4) == pytest.approx(4.0)
    assert costs.seconds(10) == pytest.approx(10.0)
    assert costs.most == 16
    costs.add(8, 1e9)  # something else kept the machine busy
    assert costs.seconds(8) <= 10.0


def test_about_so_many_rows_are_known() -> None:
    costs = StepCosts()
    costs.add(32, 1.0, sure=True)
    assert [rows for rows in range(1, 64) if costs.knows(rows)] == list(range(29, 37))


def test_a_step_that_was_disturbed_is_no_measure_of_fewer_rows() -> None:
    costs = StepCosts()
    costs.add(1, 9.0, sure=True)
    costs.add(4, 2.0, sure=True)
    assert costs.seconds(1) == 2.0


def test_costs_are_forgotten() -> None:
    costs = StepCosts()
    costs.add(8, 1.0, sure=True)
    for _ in range(256):
        assert costs.knows(8)
        costs.add(1, 1.0)
    assert not costs.knows(8) and costs.knows(1)


def test_a_first_step_alone_is_no_measure() -> None:
    costs = StepCosts()
    costs.add(1, 1.0, sure=True)
    costs.add(2, 9.0)  # room was made for it
    assert costs.seconds(2) == 1.0
    costs.add(2, 1.5)
    assert costs.seconds(2) == 1.5
    costs.add(4, 8.0)
    for _ in range(256):
        costs.add(1, 1.0)
    costs.add(4, 9.0)  # the other was long ago
    assert not costs.knows(4)


def test_a_proposer_that_takes_as_long_as_a_step_is_rarely_asked() -> None:
    rows, rate = drive(memory_bound, 0.9, asking=memory_bound(1), steps=3000)
    assert rows[100:].count(1) > 0.97 * len(rows[100:])
    assert rate > 0.95 / memory_bound(1)


def test_a_proposer_that_takes_a_part_of_a_step_is_asked_for_what_pays() -> None:
    rows, rate = drive(memory_bound, 0.7, asking=0.1 * memory_bound(1))
    assert rate > 1.65 / memory_bound(1)
    assert 3 <= max(set(rows), key=rows.count) <= 7


def test_a_proposer_is_asked_again_when_it_pays() -> None:
    lengths = Lengths(7)
    drive(memory_bound, 0.05, asking=0.1, lengths=lengths)
    rows, _ = drive(memory_bound, 0.95, asking=0.1, lengths=lengths)
    assert rows[-100:].count(1) < 5


def test_what_takes_no_time_is_always_asked_for_all() -> None:
    lengths = Lengths(7)
    drive(compute_bound, 0.1, lengths=lengths, asking=0.001)
    assert [lengths.wanted() for _ in range(100)] == [7] * 100


@dataclass
class Head:
    """One that takes ``seconds`` for a guess of each sequence, and so many counts of them."""

    each: float
    counts: Sequence[int] = (1, 3, 7)

    def heard(self, guesses: Sequence[Guessed]) -> None:
        raise AssertionError

    def seconds(self, num_sequences: int, count: int) -> float:
        made = next((each for each in self.counts if each >= count), 0) if count else 0
        return self.each * made


def lead(
    cost: Cost, chance: float, head: Head, lengths: Lengths, sequences: int = 1, steps: int = 200
) -> list[tuple[int, int]]:
    """How many guesses each step was offered, and the most that it verified of a sequence; what is
    chosen for a step is guessed after it."""
    offered, found = 0, list[tuple[int, int]]()
    for _ in range(steps):
        counts = lengths.choose(sequences, [chance] * sequences, [offered] * sequences, 512)
        found.append((offered, max(counts)))
        offered = lengths.wanted()
        lengths.landed(sequences + sum(counts), cost(sequences + sum(counts)))
    return found


def test_a_device_is_asked_for_as_many_as_pay() -> None:
    """However many it has guessed before; counts between those that it makes are not asked for."""
    for each, chance, wanted in ((0.1, 0.7, 3), (0.05, 0.95, 7), (0.3, 0.5, 1)):
        head = Head(each)
        found = lead(memory_bound, chance, head, Lengths(7, head))
        assert set(found[20:]) == {(wanted, wanted)}


def test_a_device_is_rarely_asked_where_nothing_pays_and_at_once_where_it_does() -> None:
    head = Head(0.5)
    lengths = Lengths(7, head)
    found = lead(compute_bound, 0.6, head, lengths, sequences=8)
    assert {verified for _, verified in found[5:]} == {0}
    asked = [offered for offered, _ in found[3:]]
    assert max(asked) == 1 and 2 <= sum(asked) < 60
    again = lead(memory_bound, 0.9, Head(0.01), Lengths(7, Head(0.01)), sequences=8, steps=20)
    assert again[-1] == (7, 7)


def test_what_a_device_has_guessed_is_verified_though_no_more_is_asked_for() -> None:
    """It has been paid for."""
    head = Head(100.0)
    lengths = Lengths(7, head)
    lengths.landed(1, 1.0, sure=True)
    lengths.landed(8, 1.1, sure=True)
    assert lengths.choose(1, [0.9], [3], 8) == [3]
    assert lengths.wanted() in (0, 1)
