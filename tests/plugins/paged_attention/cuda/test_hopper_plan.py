"""The plan of a step of decodes against what it promises, by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.plugins.paged_attention.cuda.hopper_plan import (
    PARTS,
    make_plan,
    programs_of,
)

pytestmark = pytest.mark.kernel

PAGE = 64
CONTEXTS = {
    "alike": [300] * 16,
    "one_long": [200] * 15 + [32768],
    "padding": [700, 0, 30, 2309, 0, 129, 0],
    "empty": [0, 0, 0],
    "first_tokens": [1, 1, 64, 65],
    "random": [int(n) for n in np.random.default_rng(0).lognormal(6, 1, 70)],
    "more_than_are_looked_at_together": [1 + n % 900 for n in range(2100)],
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize(("most", "max_splits"), [(16, 32), (132, 7), (3, 4)])
def test_every_key_has_one_program_and_no_program_much_more_than_a_share(
    name: str, joins: bool, most: int, max_splits: int, device: str
) -> None:
    contexts = CONTEXTS[name]
    given = torch.tensor(contexts, dtype=torch.int32, device=device)
    plan = make_plan(given, most, max_splits, PAGE, joins=joins, pdl=False).tolist()
    assert len(plan) == 1 + programs_of(len(contexts), most)
    pages = [max(-(-(n - joins) // PAGE), 1) if n else 0 for n in contexts]
    even, *entries = plan
    least = max(-(-sum(pages) // most), 1)
    assert least <= even <= 3 * least + 8
    wanted = entries_of(pages, even, max_splits)
    assert [entry for entry in entries if entry >= 0] == wanted
    assert set(entries[len(wanted) :]) <= {-1}


def entries_of(pages: list[int], even: int, max_splits: int) -> list[int]:
    """Of programs that have ``even`` pages each, in whole splits."""
    entries = []
    for sequence, count in enumerate(pages):
        of_split = max(-(-count // max_splits), 1)
        splits, share = math.ceil(count / of_split), math.ceil(even / of_split)
        entries += [sequence * PARTS.value + part for part in range(math.ceil(splits / share))]
    return entries


@pytest.mark.parametrize(("pages", "even"), [(5, 5), (4, 4), (7, 7), (11, 11)])
def test_no_program_waits_for_another_to_end_where_all_could_run(
    pages: int, even: int, device: str
) -> None:
    """Twelve sequences and room for sixteen programs, of which shares of 4 pages of 5 need 24."""
    given = torch.full((12,), pages * PAGE, dtype=torch.int32, device=device)
    plan = make_plan(given, 16, 32, PAGE, joins=False, pdl=False).tolist()
    assert plan == [even, *(sequence * PARTS.value for sequence in range(12)), *[-1] * 16]
