"""The ranks of an engine for GPUs as threads of this process that take turns: the interpreter runs
one kernel at a time. Engines start processes (``runtime/executors/ranks/gpu``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.rank_threads import chunk_of
from torch import Tensor

from slipstream.builder.engine import open_engine
from slipstream.plugins.rms_norm.cuda import rms_norm
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.loading import runtime_config

PIECE = 16  # rows
LIMITS: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 96, "max_seq_len": 128}


class Table:
    """Where ranks put what they give each other, and the turn to compute."""

    def __init__(self, ranks: int) -> None:
        self.turn, self.there = threading.Lock(), threading.Barrier(ranks)
        self.slots: list[list[Tensor]] = [[torch.empty(0)] * ranks for _ in range(2)]


class Filled:
    """An x that is computed in pieces, as a ``Sending`` is."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.x, self._filled = torch.full((rows, width), torch.nan, dtype=dtype), 0

    def filling(self) -> Iterator[slice]:
        """Some rows after the other."""
        for first in range(0, len(self.x), PIECE):
            yield slice(first, first + PIECE)
            self._filled = first + PIECE

    def is_full(self) -> bool:
        """Whether all of it has been asked for."""
        return self._filled >= len(self.x)


class ThreadTeam:
    """A ``Team`` of threads, which is its own communicator."""

    def __init__(self, rank: int, table: Table) -> None:
        self._rank, self._table, self._meetings = rank, table, 0
        self.communicator, self.is_first = self, rank == 0

    def sending(self, rows: int, width: int, dtype: torch.dtype) -> Filled | None:
        """See ``Communicator``."""
        return Filled(rows, width, dtype) if rows > PIECE else None

    def all_reduce(self, x: Tensor, *, sent: Filled | None = None, pdl: bool = False) -> Tensor:
        """See ``Communicator``."""
        assert sent is None or (sent.x is x and sent.is_full())
        return torch.stack([each.float() for each in self._exchange(x)]).sum(0).to(x.dtype)

    def all_reduce_add_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        epsilon: float,
        *,
        sent: Filled | None = None,
        pdl: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See ``Communicator``."""
        both = rms_norm(self.all_reduce(x, sent=sent), weight, epsilon, residual=residual)
        assert isinstance(both, tuple)
        return both

    def all_gather(self, x: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
        """See ``Communicator``."""
        return torch.cat(self._exchange(x), 1, out=out)

    def least(self, number: int) -> int:
        """See ``Team``."""
        return int(min(each.item() for each in self._exchange(torch.tensor([number]))))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        """The x of all ranks: what one reads, nobody writes before it has come to the next."""
        slots = self._table.slots[self._meetings % 2]
        self._meetings += 1
        slots[self._rank] = x.clone()
        self._table.turn.release()
        try:
            self._table.there.wait(60)
        finally:
            self._table.turn.acquire()
        return list(slots)


def logits_of_ranks(
    engine: Path, prompts: NDArray[np.int64], chunks: tuple[int, ...]
) -> NDArray[np.float32]:
    """Logits ``[2, T, vocab]`` of two sequences that advance together in steps of these tokens, the
    same on every rank of an engine for GPUs."""
    opened = open_engine(engine)
    ranks, config = opened.manifest.ranks, runtime_config(opened, LIMITS)
    table = Table(ranks)

    def work(rank: int) -> NDArray[np.float32]:
        def meet(device: Device) -> Any:  # noqa: ANN401 - it does as a team
            return ThreadTeam(rank, table)

        with table.turn:
            executor = CUDAExecutor(opened, config, rank, meet if ranks > 1 else None)
            executor._allocate(executor._team.least(9) if executor._team else 9)
            made, start = [], 0
            for size in chunks:
                batch = chunk_of(
                    prompts, start, size, opened.manifest.caches, page=config.page_size
                )
                made.append(executor.logits(batch).reshape(2, size, -1))
                start += size
        return np.concatenate(made, axis=1)

    with ThreadPoolExecutor(ranks) as pool:
        pending = [pool.submit(work, rank) for rank in range(ranks)]
        try:
            first, *others = [each.result() for each in pending]
        except BaseException:
            table.there.abort()
            raise
    for other in others:
        np.testing.assert_array_equal(first, other)
    return first
