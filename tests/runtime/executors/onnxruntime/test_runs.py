"""Steps cut for a graph whose rows are slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.runtime.engine.step import PagedInputs, StepBatch
from slipstream.runtime.executors.onnxruntime.runs import Run, SlotRuns

POSITIONS = 101


def step(*sequences: tuple[int, int, int]) -> StepBatch:
    """A step of sequences ``(slot, start, count)``, whose tokens are slot * 1000 + position; the
    last token of each is sampled."""
    slots, starts, counts = (np.array(x, np.int32) for x in zip(*sequences, strict=True))
    positions = np.concatenate([np.arange(s, s + n) for _, s, n in sequences]).astype(np.int32)
    owners = np.repeat(slots, counts)
    ends = np.cumsum(counts).astype(np.int32)
    return StepBatch(
        token_ids=(owners * 1000 + positions).astype(np.int32),
        positions=positions,
        query_start=np.concatenate([[0], ends]).astype(np.int32),
        context_len=(starts + counts).astype(np.int32),
        logits_rows=ends - 1,
        sampling=[],
        slots=np.arange(len(slots), dtype=np.int32),
        sampling_slots=np.empty(0, np.int32),
        pages={"kv": PagedInputs(slots[:, None], owners * POSITIONS + positions)},
    )


def listed(run: Run) -> dict[str, Sequence[int]]:
    return {name: values.tolist() for name, values in run.values.items()}


def test_decodes_are_one_run_and_every_chunk_another() -> None:
    runs = SlotRuns("kv", 8, POSITIONS, captures=False)
    decodes, chunk = runs(step((5, 9, 1), (2, 0, 3), (4, 20, 1)))
    assert (decodes.first, decodes.count, decodes.order.tolist()) == (4, 2, [0, 2])
    assert listed(decodes) == {
        "token_ids": [4020, 5009], "positions": [20, 9], "context_len": [21, 10],
        "logits_rows": [1, 0], "longest_context": [21],
    }  # fmt: skip
    assert (chunk.first, chunk.count, chunk.order.tolist()) == (2, 1, [1])
    assert listed(chunk) == {
        "token_ids": [2000, 2001, 2002], "positions": [0, 1, 2], "context_len": [3],
        "logits_rows": [2], "longest_context": [3],
    }  # fmt: skip


def test_a_slot_between_two_that_decode_is_written_after_its_sequence() -> None:
    """Also in the step that computes a chunk of it, in whatever order the runs are."""
    runs = SlotRuns("kv", 8, POSITIONS, captures=False)
    runs(step((1, 0, 7)))
    decodes, _ = runs(step((0, 3, 1), (2, 5, 1), (1, 7, 4)))
    assert listed(decodes)["positions"] == [3, 11, 5]
    assert decodes.num_rows == 2, "no logits are computed of padding"
    assert runs(step((0, 4, 1), (2, 6, 1)))[0].values["positions"].tolist() == [4, 11, 6]


def test_padding_fits_behind_the_longest_sequence() -> None:
    runs = SlotRuns("kv", 3, POSITIONS, captures=False)
    runs(step((1, 0, POSITIONS - 1)))
    (decodes,) = runs(step((0, 0, 1), (2, 0, 1)))
    assert decodes.values["positions"].tolist() == [0, POSITIONS - 1, 0]


def test_a_slot_that_another_sequence_took_is_padded_behind_that_one() -> None:
    runs = SlotRuns("kv", 3, POSITIONS, captures=False)
    runs(step((1, 0, 50)))
    decodes, _ = runs(step((0, 0, 1), (2, 0, 1), (1, 0, 60)))
    assert decodes.values["positions"].tolist() == [0, 60, 0]


def test_captured_runs_have_one_of_few_shapes_and_give_all_rows() -> None:
    runs = SlotRuns("kv", 6, POSITIONS, captures=True)
    assert runs.buckets == [1, 2, 4, 6]
    (decodes,) = runs(step((4, 9, 1), (1, 20, 1)))
    assert (decodes.first, decodes.count, decodes.captured) == (0, 6, True)
    assert decodes.values["logits_rows"].tolist() == [0, 1, 2, 3, 4, 5]
    assert decodes.values["longest_context"].tolist() == [POSITIONS], "it is part of the graph"
    assert decodes.rows is not None and decodes.rows.tolist() == [4, 1]
    assert decodes.order.tolist() == [0, 1]
    assert runs(step((0, 0, 1)))[0].count == 1


def test_padding_alone_leaves_every_sequence_as_it_is() -> None:
    runs = SlotRuns("kv", 4, POSITIONS, captures=True)
    runs(step((1, 0, 7)))
    run = runs.padding(4)
    assert run.values["positions"].tolist() == [0, 7, 0, 0]
    assert not len(run.order)
