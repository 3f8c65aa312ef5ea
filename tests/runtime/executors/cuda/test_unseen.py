"""What the host finds of drafts that it had not seen: the runs that the device goes on from."""

from __future__ import annotations

import numpy as np

from slipstream.errors import ExecutionError
from slipstream.plugins.drafting import COLUMNS
from slipstream.runtime.engine.step import REJECTED, StepBatch, StepResult
from slipstream.runtime.executors.cuda.unseen import Unseen

VOCAB = 50
# Of each sequence: slot, tokens, drafts, whether it samples, and what is sampled of its rows.
SEQUENCES: list[tuple[int, list[int], int, list[int]]] = [
    (3, [-1, -1, -1, -1], 3, [10, 11, 12, 13]),  # all are right, and the next guess too
    (0, [-1], 0, [20]),  # none to verify, and the guess was right
    (5, [7, -1, -1], 2, [30, 9, 9]),  # the second is wrong
    (1, [1, 2, 3], 0, []),  # a part of a prompt
    (4, [5, 6, 7], 2, [6, 7, 8]),  # drafts of the host
    (2, [-1, -1, -1], 2, [0, 0, 9]),  # no guess, and one that is no token, are token 0
]
GUESSES = {3: [10, 11, 12, 13], 0: [20, 1], 5: [30, 31, 32], 1: [9], 4: [8], 2: [-1, VOCAB]}


def batch() -> tuple[StepBatch, list[int], list[int]]:
    """The step, the places of the rows that are sampled, and what is; one row scores a prompt."""
    counts = [len(tokens) for _, tokens, _, _ in SEQUENCES]
    start = np.array([0, *np.cumsum(counts)], np.int32)
    rows, sampled, places = list[int](), list[int](), list[int]()
    for end, (_, tokens, drafts, came) in zip(start[1:].tolist(), SEQUENCES, strict=True):
        if not came:  # the second token of the prompt is scored
            rows.append(end - len(tokens))
            sampled.append(-1)
            continue
        places += range(len(rows), len(rows) + drafts + 1)
        rows += range(end - 1 - drafts, end)
        sampled += came
    empty = np.zeros(0, np.int32)
    step = StepBatch(
        token_ids=np.array([t for _, tokens, _, _ in SEQUENCES for t in tokens], np.int32),
        positions=empty,
        query_start=start,
        context_len=empty,
        logits_rows=np.array(rows, np.int32),
        sampling=[],
        slots=np.array([slot for slot, _, _, _ in SEQUENCES], np.int32),
        sampling_slots=empty,
        pages={},
        drafts=[drafts for _, _, drafts, _ in SEQUENCES],
    )
    return step, places, sampled


def test_the_host_finds_the_runs_of_the_device() -> None:
    guessed = np.full((6, COLUMNS), -1, np.int32)
    for slot, guesses in GUESSES.items():
        guessed[slot, : len(guesses)] = guesses
    step, places, sampled = batch()
    result = StepResult(sampled, [None] * len(sampled), failed={7: ExecutionError("gone")})
    Unseen.of(step, places, guessed, VOCAB).reject(result)
    assert result.right is not None
    assert [result.right[i] for i in (0, 1, 2, 3, 5)] == [4, 1, 1, 0, 2]
    assert result.token_ids == [
        *(10, 11, 12, 13),
        20,
        *(30, 9, REJECTED),
        -1,
        *(6, 7, 8),  # which ``reject`` looks at
        *(0, 0, 9),
    ]
    assert not result.failed, "a row after a wrong draft has no answer to fail"
