"""The ranks of an engine as threads of this process, for tests of what they compute together.

Engines start processes (``runtime/executors/ranks``); these begin in no time.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import LOGITS, CacheSpec
from slipstream.builder.engine import open_engine
from slipstream.plugins.collectives.native import join, memory_size
from slipstream.runtime.engine.step import PagedInputs, StepBatch
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.loading import runtime_config

T = TypeVar("T")
CHUNKS = (40, 1, 33, 1)


class RankThreads:
    """One thread a rank, each with an executor that only it uses."""

    def __init__(self, engine: Path) -> None:
        opened = open_engine(engine)
        self.ranks = opened.manifest.ranks
        self.caches = opened.manifest.caches
        self._memory = mmap.mmap(-1, memory_size(self.ranks, 4096))
        self._threads = [ThreadPoolExecutor(1) for _ in range(self.ranks)]
        self._executors: dict[int, CPUExecutor] = {}
        config = runtime_config(opened, {"num_threads": 1})

        def start(rank: int) -> None:
            if self.ranks > 1:
                join(self._memory, rank, self.ranks)
            self._executors[rank] = CPUExecutor(opened, config, rank)
            self._executors[rank].reserve_kv(16 << 20)

        self.each(start)

    def each(self, work: Callable[[int], T]) -> list[T]:
        """What every rank makes of its number."""
        pending = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        return [each.result() for each in pending]

    def run(self, batch: StepBatch, output: str) -> list[NDArray[np.float32]]:
        """An output of a step, as each rank has it."""

        def work(rank: int) -> NDArray[np.float32]:
            made: NDArray[np.float32] = self._executors[rank].run(batch)[output].copy()
            return made

        return self.each(work)

    def close(self) -> None:
        """End the threads; their sessions are gone when nobody has this any more."""
        for thread in self._threads:
            thread.shutdown()


@contextmanager
def rank_threads(engine: Path) -> Iterator[RankThreads]:
    """The ranks of an engine directory."""
    threads = RankThreads(engine)
    try:
        yield threads
    finally:
        threads.close()


def run_in_chunks(
    engine: Path, prompts: NDArray[np.int64], output: str = LOGITS
) -> NDArray[np.float32]:
    """Logits ``[2, T, vocab]`` of two sequences that advance together in steps of ``CHUNKS``
    tokens, the same on every rank."""
    made, start = [], 0
    with rank_threads(engine) as threads:
        for size in CHUNKS:
            batch = chunk_of(prompts, start, size, threads.caches, output)
            first, *others = threads.run(batch, output)
            for other in others:
                np.testing.assert_array_equal(first, other)
            made.append(first.reshape(2, size, -1))
            start += size
    return np.concatenate(made, axis=1)


def chunk_of(
    prompts: NDArray[np.int64],
    start: int,
    size: int,
    caches: tuple[CacheSpec, ...],
    output: str = LOGITS,
    page: int = 32,
) -> StepBatch:
    """The next tokens of two sequences whose pages interleave and run backwards."""
    table = np.array([[7, 5, 3], [6, 4, 2]], np.int32)[:, : -(-prompts.shape[1] // page)]
    positions = np.tile(np.arange(start, start + size, dtype=np.int32), 2)
    slots = table[np.repeat([0, 1], size), positions // page] * page + positions % page
    pages = PagedInputs(table, slots.astype(np.int32))
    return StepBatch(
        token_ids=prompts[:, start : start + size].reshape(-1).astype(np.int32),
        positions=positions,
        query_start=np.array([0, size, 2 * size], np.int32),
        context_len=np.array([start + size] * 2, np.int32),
        logits_rows=np.arange(2 * size, dtype=np.int32),
        sampling=[],
        slots=np.array([0, 1], np.int32),
        sampling_slots=np.full(2 * size, -1, np.int32),
        pages={cache.name: pages for cache in caches},
        outputs=() if output == LOGITS else (output,),
    )
