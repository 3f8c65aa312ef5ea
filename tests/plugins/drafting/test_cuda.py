"""What a device puts into a step that was planned without its tokens, against plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from slipstream.plugins.drafting import COLUMNS
from slipstream.plugins.drafting.cuda import (
    DraftBuffers,
    Table,
    Tokens,
    advance,
    follow,
    move_rows,
)
from slipstream.plugins.sampling import Field

pytestmark = pytest.mark.kernel
PAGE, SLOTS, VOCAB = 4, 6, 50


@dataclass
class Planned:
    """A sequence of a step as the host planned it: ``tokens`` from position ``start`` on, of which
    the last ``drafts`` are drafts and -1 is unknown."""

    slot: int
    start: int
    tokens: list[int]
    drafts: int = 0
    samples: bool = True


SEQUENCES = [
    Planned(4, 9, [-1, -1, -1, -1], 3),  # goes on from a run of three
    Planned(0, 17, [-1]),  # from one of two, without drafts
    Planned(2, 5, [7, -1, -1], 2),  # the host knows its tokens
    Planned(5, 3, [8, 9, 10], 2),  # and its drafts
    Planned(1, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], samples=False),  # a part of a prompt
    Planned(3, 6, [-1, -1, -1, -1, -1, -1, -1, -1], 7),
]
LAST = [40, 41, 42, 43, 44, 45]
RUNS = [1, 5, 2, 0, 2, 3]
GUESSES = np.arange(SLOTS * COLUMNS).reshape(SLOTS, COLUMNS) % VOCAB
GUESSES[4, 1], GUESSES[3, 2] = -1, VOCAB + 5  # none, and one that there is not


def completed(planned: Planned) -> list[int]:
    """Its tokens as the device knows them."""
    known = list(planned.tokens)
    if known[0] < 0:
        known[0] = LAST[planned.slot]
    for i in range(planned.drafts):
        place, guess = len(known) - planned.drafts + i, int(GUESSES[planned.slot, i])
        if known[place] < 0:
            known[place] = guess if 0 <= guess < VOCAB else 0
    return known


def put_in(more: list[int]) -> dict[tuple[int, int], int]:
    """The drafts that only the device knows, by slot and position."""
    return {
        (each.slot, each.start + moved + place): token
        for each, moved in zip(SEQUENCES, more, strict=True)
        for place, token in enumerate(completed(each))
        if place >= len(each.tokens) - each.drafts and each.tokens[place] < 0
    }


PADDING = [0] * 3  # of sequences and of tokens


def test_a_step_is_completed_and_followed(device: str) -> None:
    def put(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    counts = [len(each.tokens) for each in SEQUENCES]
    flat = [token for each in SEQUENCES for token in each.tokens]
    start = [each.start + i for each in SEQUENCES for i in range(len(each.tokens))]
    table = np.arange(len(SEQUENCES) * 12).reshape(-1, 12)[:, ::-1].copy()

    def slot_of(sequence: int, position: int) -> int:
        return int(table[sequence, position // PAGE]) * PAGE + position % PAGE

    owners = [s for s, count in enumerate(counts) for _ in range(count)]
    tokens = Tokens(
        put([*flat, *PADDING]),
        put([*start, *PADDING]),
        put([0, *np.cumsum(counts).tolist(), *PADDING]),
        put([*(SEQUENCES[s].slot for s in owners), *PADDING]),
        put([*(each.drafts for each in SEQUENCES), *PADDING]),
    )
    context = put([*(each.start + len(each.tokens) for each in SEQUENCES), *PADDING])
    slots = put([*map(slot_of, owners, start), -1, -1, -1])
    buffers = DraftBuffers.allocate(len(flat) + 3, len(SEQUENCES) + 3, 16, VOCAB, None, put(LAST))
    buffers.runs.copy_(put(RUNS))
    buffers.guesses[:-1].copy_(torch.from_numpy(GUESSES))
    pages = torch.from_numpy(np.vstack([table, table[:3]])).to(device, torch.int32)
    history = torch.full((SLOTS, 48), -7, dtype=torch.int32, device=device)
    advance(tokens, context, [Table(pages, slots, PAGE)], history, VOCAB, buffers, False)

    more = [RUNS[each.slot] if each.tokens[0] < 0 else 0 for each in SEQUENCES]
    wanted = [completed(each) for each in SEQUENCES]
    positions = [start[i] + more[s] for i, s in enumerate(owners)]
    assert tokens.token_ids.tolist() == [*(t for each in wanted for t in each), *PADDING]
    assert tokens.positions.tolist() == [*positions, *PADDING]
    assert context[: len(SEQUENCES)].tolist() == [
        each.start + len(each.tokens) + m for each, m in zip(SEQUENCES, more, strict=True)
    ]
    assert slots.tolist() == [*map(slot_of, owners, positions), -1, -1, -1]
    assert buffers.runs.tolist() == [0] * SLOTS
    noted = {
        (slot, place): int(history[slot, place])
        for slot, place in (history >= 0).nonzero().tolist()
    }
    assert noted == put_in(more)

    rows = [(each.slot, i) for each in SEQUENCES if each.samples for i in range(1 + each.drafts)]
    params = put([0]).expand(len(Field), len(rows) + 2).clone()
    params[Field.SLOT] = put([*(slot for slot, _ in rows), -1, -1])
    params[Field.POSITION] = put([*(i for _, i in rows), 9, 9])
    move_rows(params, len(rows) + 2, buffers, False)
    moved = {each.slot: m for each, m in zip(SEQUENCES, more, strict=True)}
    assert params[Field.POSITION].tolist() == [*(i + moved[slot] for slot, i in rows), 9, 9]

    # The first and the fourth have all drafts right, the third one, the last none.
    right = {4: 3, 0: 0, 2: 1, 5: 2, 3: 0}
    sampled, firsts, last = list[int](), list[int](), {}
    for each, known in zip(SEQUENCES, wanted, strict=True):
        firsts.append(len(sampled) if each.samples else -1)
        if each.samples:
            drafts, count = known[len(known) - each.drafts :], right[each.slot]
            rest = [29 - i for i in range(each.drafts + 1 - count)]
            sampled += [*drafts[:count], *rest]
            last[each.slot] = rest[0]
    at = [token for each in SEQUENCES for token in [3] * len(each.tokens)]
    follow(tokens, put([*at, *PADDING]), put([*firsts, -1, -1, -1]), put(sampled), buffers, False)
    ends = np.cumsum(counts)
    for place, each in enumerate(SEQUENCES):
        index = int(ends[place]) - 1 - each.drafts + right.get(each.slot, 0)
        assert int(buffers.last[place]) == index
        assert int(buffers.position[place]) == positions[index]
    assert buffers.owner.tolist() == [*(each.slot for each in SEQUENCES), *[SLOTS] * 3]
    assert buffers.runs.tolist() == [right.get(slot, 0) for slot in range(SLOTS)]
    assert buffers.last_tokens.tolist() == [last.get(slot, LAST[slot]) for slot in range(SLOTS)]
