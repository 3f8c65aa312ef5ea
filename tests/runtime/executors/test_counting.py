from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from slipstream.builder.contract import KV
from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.executors.counting import CountingExecutor, counting_contract
from slipstream.runtime.sampling.params import SamplingParams

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
        logits_rows=np.array([len(tokens) - 1], np.int32),
        sampling=[SamplingRow(GREEDY, tokens, [], seed=0)],
        slots=np.array([0], np.int32),
        sampling_slots=np.array([0], np.int32),
        pages={KV: PagedInputs(table, table[0, positions // 2] * 2 + positions % 2)},
    )


def one_more(tokens: list[int], pages: list[int], token: int, known: int = 3) -> StepBatch:
    """The last of ``tokens`` alone, given as ``token``; the host knows the first ``known``."""
    batch = prefill(tokens, pages)
    batch.token_ids, batch.positions = np.array([token], np.int32), batch.positions[-1:]
    paged, batch.logits_rows[:] = batch.pages[KV], 0
    batch.pages = {KV: PagedInputs(paged.page_table, paged.slot_mapping[-1:])}
    batch.query_start[1] = 1
    batch.sampling = [
        SamplingRow(GREEDY, tokens[:2], tokens[2:known], seed=0, position=len(tokens) - 2)
    ]
    return batch


def test_it_counts() -> None:
    executor = CountingExecutor(4, *counting_contract(2, 10))
    assert executor.submit(prefill([4, 8, 9], [3, 0])).sample().result().token_ids == [0]


def _wrong_slot(batch: StepBatch) -> None:
    batch.pages[KV].slot_mapping[1] = 2


def _same_slot(batch: StepBatch) -> None:
    batch.pages[KV].slot_mapping[1] = batch.pages[KV].slot_mapping[0]


def _wrong_position(batch: StepBatch) -> None:
    batch.positions[:] += 1


def _wrong_token(batch: StepBatch) -> None:
    batch.token_ids[0] += 1


def _wrong_table(batch: StepBatch) -> None:
    batch.pages[KV].page_table[0, 0] = 1


@pytest.mark.parametrize(
    "spoil", [_wrong_slot, _same_slot, _wrong_position, _wrong_token, _wrong_table]
)
def test_it_notices_wrong_paging(spoil: Callable[[StepBatch], None]) -> None:
    executor = CountingExecutor(4, *counting_contract(2, 10))
    batch = prefill([4, 5, 6], [3, 0])
    spoil(batch)
    with pytest.raises(AssertionError):
        executor.submit(batch).sample().result()


def test_a_failing_step_leaves_garbage() -> None:
    executor = CountingExecutor(4, *counting_contract(2, 10))
    executor.submit(prefill([4, 5], [0])).sample().result()
    executor.fail_next = True
    with pytest.raises(ExecutionError):
        executor.submit(prefill([4, 5], [0])).sample().result()
    decode = one_more([4, 5, 6], [0, 1], 6)
    with pytest.raises(AssertionError, match="another sequence"):
        executor.submit(decode).sample().result()


def ahead() -> CountingExecutor:
    return CountingExecutor(4, *counting_contract(2, 10), runs_ahead=True)


def test_it_puts_in_the_token_that_only_the_device_knows() -> None:
    executor = ahead()
    first = executor.submit(prefill([4, 5], [0])).sample()
    second = executor.submit(one_more([4, 5, 6], [0, 1], -1, known=2)).sample()
    assert first.result().token_ids == [6]
    third = executor.submit(one_more([4, 5, 6, 7], [0, 1], -1)).sample()
    assert second.result().token_ids == [7]
    assert third.result().token_ids == [8]


def test_it_notices_a_token_that_no_step_before_has_sampled() -> None:
    executor = ahead()
    executor.submit(prefill([4, 5], [0])).sample()
    other = one_more([4, 5, 6], [0, 1], -1, known=2)
    other.slots = other.sampling_slots = np.array([1], np.int32)
    with pytest.raises(KeyError):
        executor.submit(other)


def test_it_notices_a_token_that_the_host_could_know() -> None:
    executor = ahead()
    executor.submit(prefill([4, 5], [0])).sample().result()
    with pytest.raises(AssertionError, match="the host knows"):
        executor.submit(one_more([4, 5, 6], [0, 1], -1, known=2))


def test_it_notices_a_wrong_position_in_the_output() -> None:
    batch = prefill([4, 5], [0])
    batch.sampling[0].position = 1
    with pytest.raises(AssertionError, match="another position"):
        ahead().submit(batch)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_it_takes_no_more_steps_than_it_said(runs_ahead: bool) -> None:
    executor = CountingExecutor(4, *counting_contract(2, 10), runs_ahead=runs_ahead)
    for _ in range(1 + runs_ahead):
        executor.submit(prefill([4, 5], [0])).sample()
    with pytest.raises(AssertionError, match="too many steps"):
        executor.submit(prefill([4, 5], [0])).sample()


def test_it_hands_over_results_in_order() -> None:
    executor = ahead()
    executor.submit(prefill([4, 5], [0])).sample()
    with pytest.raises(AssertionError, match="out of order"):
        executor.submit(prefill([4, 5], [1])).sample().result()


def test_what_builds_on_a_failed_step_is_garbage_until_the_host_has_heard_of_it() -> None:
    executor = ahead()
    executor.fail_next = True
    failing = executor.submit(prefill([4, 5], [0])).sample()
    after = executor.submit(one_more([4, 5, 6], [0, 1], -1, known=2)).sample()
    with pytest.raises(ExecutionError):
        failing.result()
    assert after.result().token_ids == [-1]
    with pytest.raises(AssertionError, match="another sequence"):
        executor.submit(one_more([4, 5, 6], [0, 1], 6))


def test_it_notices_a_step_that_was_never_sampled() -> None:
    executor = ahead()
    started = executor.submit(prefill([4, 5], [0]))
    with pytest.raises(AssertionError, match="never sampled"):
        executor.submit(one_more([4, 5, 6], [0, 1], -1, known=2))
    with pytest.raises(AssertionError, match="never sampled"):
        started.result()


def test_it_notices_a_row_sampled_before_the_host_knows_its_output() -> None:
    executor = ahead()
    first = executor.submit(prefill([4, 5], [0])).sample()
    batch = one_more([4, 5, 6], [0, 1], -1, known=2)
    batch.sampling[0].params = SamplingParams(temperature=0, bad_words_token_ids=[[1, 2]])
    second = executor.submit(batch)
    with pytest.raises(AssertionError, match="must know the output"):
        second.sample()
    assert first.result().token_ids == [6]
