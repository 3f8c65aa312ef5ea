from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from slipstream.errors import ExecutionError
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.sampling_params import SamplingParams
from slipstream.runtime.step import SamplingRow, StepBatch

GREEDY = SamplingParams(temperature=0)


def prefill(tokens: list[int], pages: list[int]) -> StepBatch:
    """The whole of ``tokens`` as one prefill, two tokens a page."""
    positions = np.arange(len(tokens), dtype=np.int32)
    table = np.array([pages], np.int32)
    return StepBatch(
        token_ids=np.array(tokens, np.int32),
        positions=positions,
        query_start=np.array([0, len(tokens)], np.int32),
        context_len=np.array([len(tokens)], np.int32),
        page_table=table,
        slot_mapping=table[0, positions // 2] * 2 + positions % 2,
        logits_rows=np.array([len(tokens) - 1], np.int32),
        sampling=[SamplingRow(GREEDY, tokens, [], seed=0)],
    )


def test_it_counts() -> None:
    executor = CountingExecutor(num_pages=4, page_size=2, vocab_size=10)
    assert executor.submit(prefill([4, 8, 9], [3, 0])).result().token_ids == [0]


def _wrong_slot(batch: StepBatch) -> None:
    batch.slot_mapping[1] = 2


def _same_slot(batch: StepBatch) -> None:
    batch.slot_mapping[1] = batch.slot_mapping[0]


def _wrong_position(batch: StepBatch) -> None:
    batch.positions[:] += 1


def _wrong_token(batch: StepBatch) -> None:
    batch.token_ids[0] += 1


def _wrong_table(batch: StepBatch) -> None:
    batch.page_table[0, 0] = 1


@pytest.mark.parametrize(
    "spoil", [_wrong_slot, _same_slot, _wrong_position, _wrong_token, _wrong_table]
)
def test_it_notices_wrong_paging(spoil: Callable[[StepBatch], None]) -> None:
    executor = CountingExecutor(num_pages=4, page_size=2, vocab_size=10)
    batch = prefill([4, 5, 6], [3, 0])
    spoil(batch)
    with pytest.raises(AssertionError):
        executor.submit(batch).result()


def test_a_failing_step_leaves_garbage() -> None:
    executor = CountingExecutor(num_pages=4, page_size=2, vocab_size=10)
    executor.submit(prefill([4, 5], [0])).result()
    executor.fail_next = True
    with pytest.raises(ExecutionError):
        executor.submit(prefill([4, 5], [0])).result()
    decode = prefill([4, 5, 6], [0, 1])
    decode.token_ids, decode.positions = decode.token_ids[2:], decode.positions[2:]
    decode.slot_mapping, decode.logits_rows[:] = decode.slot_mapping[2:], 0
    decode.query_start[1] = 1
    with pytest.raises(AssertionError, match="another sequence"):
        executor.submit(decode).result()
