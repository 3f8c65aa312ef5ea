"""A step is the same behind common memory."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tests.rank_threads import chunk_of
from tests.runtime.executors.two_graphs import CACHES, save_engine

from slipstream.builder.contract import paged
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.ranks.executor import RankExecutor
from slipstream.runtime.executors.ranks.message import StepCodec
from slipstream.runtime.executors.ranks.protocol import Step
from slipstream.runtime.executors.ranks.region import Region
from slipstream.runtime.sampling.sampler import Sampler

TOKENS = np.arange(400).reshape(2, 200)


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = (
            (getattr(one[name], each.name), getattr(other[name], each.name))
            for name in one
            for each in fields(one[name])
        )
        return one.keys() == other.keys() and all(same(*pair) for pair in pairs)
    return one == other


def test_a_step_is_read_as_it_was_written(tmp_path: Path) -> None:
    """With every graph, outputs and moves, in memory that has to grow for the larger ones, seen by
    who has mapped it when it was small."""
    graphs = save_engine(tmp_path).graphs
    codec, region = StepCodec(graphs, CACHES), Region.make()
    reader = Region(region.descriptor)
    reader.map(1)
    told = ("token_ids", "positions", "query_start", "context_len", "logits_rows", "slots")
    for size in (1, 60, 3):
        for graph, spec in graphs.items():
            batch: StepBatch = chunk_of(TOKENS, 0, size, paged(CACHES))
            batch.graph = graph
            batch.outputs = tuple(output.name for output in spec.outputs[1:])
            batch.moves = [Move(cache.name, 3 + n, size) for n, cache in enumerate(CACHES)]
            found = codec.read(reader, codec.write(batch, region))
            for name in (*told, "pages", "graph", "outputs", "moves"):
                assert same(getattr(batch, name), getattr(found, name)), name
            assert found.sampling == []
    reader.close()


def test_ranks_are_told_of_drafts_as_queries_of_their_sequence(tmp_path: Path) -> None:
    """As one device computes them: all of a sequence read its keys once."""
    told, executor = list[Step](), RankExecutor.__new__(RankExecutor)
    executor._codec = StepCodec(save_engine(tmp_path).graphs, CACHES)
    executor._sampler = Sampler(9, 1)
    group: Any = SimpleNamespace(steps=Region.make(), tell=told.append)
    executor.group = group
    batch: StepBatch = chunk_of(TOKENS, 0, 3, paged(CACHES))
    batch.drafts = [2, 0]
    executor.submit(batch)
    found = executor._codec.read(group.steps, told[0].numbers)
    assert np.diff(found.query_start).tolist() == [3, 3]
    assert found.context_len.tolist() == [3, 3]
    group.steps.close()
