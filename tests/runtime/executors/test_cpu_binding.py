"""What a bound graph computes with: the arrays of the very step that is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream import SamplingParams
from slipstream.builder.contract import KV
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.base import StartedStep
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.llm import LLM
from slipstream.runtime.loading import load


def test_arrays_that_may_have_changed_are_written_again(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's array is taken to be in place only if nobody can have written to it."""
    engine = load(tiny_engine, {"num_threads": 1})
    executor, batches = engine.executor, list[StepBatch]()
    assert isinstance(executor, CPUExecutor)
    submit = executor.submit

    def noted(batch: StepBatch) -> StartedStep:
        batches.append(batch)
        return submit(batch)

    monkeypatch.setattr(executor, "submit", noted)
    with LLM.from_engine(engine) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        before, last = batches[-2:]
        assert before.query_start is last.query_start, "which is not written twice"
        assert last.token_ids.flags.writeable and not last.query_start.flags.writeable

        monkeypatch.undo()
        expected = [executor.logits(replace(last, token_ids=_tokens(n))) for n in (9, 10)]
        own = replace(last, token_ids=_tokens(9))
        found = [executor.logits(own)]
        own.token_ids[0] = 10
        found.append(executor.logits(own))

        paged = last.pages[KV]
        others = replace(paged, page_table=paged.page_table + 1)
        expected.append(executor.logits(replace(last, pages={KV: others})))
        own = replace(last, pages={KV: replace(paged, page_table=paged.page_table.copy())})
        executor.logits(own)
        own.pages[KV].page_table[:] += 1
        found.append(executor.logits(own))
    assert not np.array_equal(expected[0], expected[1])
    np.testing.assert_array_equal(found, expected)


def _tokens(token: int) -> NDArray[np.int32]:
    return np.array([token], np.int32)
