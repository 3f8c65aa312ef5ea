"""Drafts as sequences of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slipstream.runtime.engine.step import PagedInputs, StepBatch


def single_queries(batch: StepBatch) -> StepBatch:
    """The same step with every draft as a sequence of one query, in the pages of its own.

    All keys and values of a step are written before any is read, so a draft finds those before it.
    Attention then computes it as a step that knew the tokens before would: bit for bit the same,
    because how a sequence is cut into tasks, and so how sums are rounded, depends on its lengths.
    """
    if not any(batch.drafts):
        return batch
    parts = 1 + np.array(batch.drafts, np.int32)
    owners = np.arange(len(parts), dtype=np.int32).repeat(parts)
    lengths = np.ones(len(owners), np.int32)
    lengths[np.cumsum(parts) - parts] = np.diff(batch.query_start) - parts + 1
    query_start = np.zeros(len(owners) + 1, np.int32)
    np.cumsum(lengths, out=query_start[1:])
    pages = {
        name: PagedInputs(paged.page_table[owners], paged.slot_mapping)
        for name, paged in batch.pages.items()
    }
    return replace(
        batch,
        query_start=query_start,
        context_len=batch.positions[query_start[1:] - 1] + 1,
        slots=batch.slots[owners],
        pages=pages,
        drafts=(),
    )
