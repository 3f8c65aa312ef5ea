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
from slipstream.plugins.paged_attention.reference import Attributes

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
@pytest.mark.parametrize(
    ("slots", "kv_heads", "max_splits"), [(132, 8, 32), (396, 3, 7), (5, 8, 4)]
)
def test_every_key_has_one_program_and_no_program_much_more_than_a_share(
    name: str, joins: bool, slots: int, kv_heads: int, max_splits: int, device: str
) -> None:
    contexts = CONTEXTS[name]
    a = Attributes(0, 2 * kv_heads, kv_heads, 64, PAGE, 1.0)
    given = torch.tensor(contexts, dtype=torch.int32, device=device)
    plan = make_plan(given, slots, max_splits, a, joins=joins, pdl=False).tolist()
    assert len(plan) == 1 + programs_of(len(contexts), slots, kv_heads)
    pages = [max(-(-(n - joins) // PAGE), 1) if n else 0 for n in contexts]
    even, *entries = plan
    least = max(-(-sum(pages) * kv_heads // slots), 1)
    assert least <= even <= least + 3
    wanted = entries_of(pages, even, max_splits)
    assert [entry for entry in entries if entry >= 0] == wanted
    assert set(entries[len(wanted) :]) <= {-1}


def entries_of(pages: list[int], even: int, max_splits: int) -> list[int]:
    """Of programs that have ``even`` pages each, in whole splits, then of those with the rest."""
    whole, last = [], []
    for sequence, count in enumerate(pages):
        of_split = max(-(-count // max_splits), 1)
        splits, share = math.ceil(count / of_split), math.ceil(even / of_split)
        *before, end = [sequence * PARTS.value + part for part in range(-(-splits // share))] or [
            -1
        ]
        whole += before
        last += [end] if count else []
    return whole + last


@pytest.mark.parametrize(("count", "pages", "even"), [(12, 5, 5), (12, 11, 11), (8, 5, 3)])
def test_no_program_waits_for_another_to_end_where_all_could_run(
    count: int, pages: int, even: int, device: str
) -> None:
    """132 run at a time, of which shares of 4 pages of twelve sequences' 5 would need 192."""
    given = torch.full((count,), pages * PAGE, dtype=torch.int32, device=device)
    a = Attributes(0, 32, 8, 128, PAGE, 1.0)
    plan = make_plan(given, 132, 32, a, joins=False, pdl=False).tolist()
    entries = entries_of([pages] * count, even, 32)
    assert plan == [even, *entries, *[-1] * (count + 16 - len(entries))]


def test_a_large_share_does_not_grow(device: str) -> None:
    """Its splits are large, too: 513 pages of 31 splits are 15 and 15 and hardly anything."""
    given = torch.full((8,), 513 * PAGE, dtype=torch.int32, device=device)
    a = Attributes(0, 32, 8, 128, PAGE, 1.0)
    even, *entries = make_plan(given, 132, 32, a, joins=False, pdl=False).tolist()
    assert (even, len([entry for entry in entries if entry >= 0])) == (249, 24)
