"""A step as ranks are told it: numbers in common memory, int32 one after the other.

    array sizes ...  graph  outputs  moves  |  arrays  |  moves (cache, source, destination)

Ranks compute; what a step samples is known to the engine's own process alone, and is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slipstream.builder.contract import CacheSpec, GraphSpec, paged
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.step import IntArray, PagedInputs, StepBatch
from slipstream.runtime.executors.ranks.region import Region

_INT = np.dtype(np.int32).itemsize


@dataclass(frozen=True, slots=True)
class StepCodec:
    """Writes and reads the steps of one engine, whose names have numbers by their order."""

    graphs: Mapping[str, GraphSpec]
    caches: Sequence[CacheSpec]

    def write(self, batch: StepBatch, region: Region) -> int:
        """Put a step at the beginning of a region; returns its int32 numbers."""
        arrays = [*self._arrays(batch)]
        graph = [*self.graphs].index(batch.graph)
        outputs = self._outputs(batch.graph)
        names = [cache.name for cache in self.caches]
        moves = [(names.index(move.cache), move.source, move.destination) for move in batch.moves]
        head = [
            *(size for array in arrays for size in (array.shape[0], array.shape[-1])),
            graph,
            sum(1 << outputs.index(name) for name in batch.outputs),
            len(moves),
        ]
        parts = [np.array(head, np.int32), *arrays, np.array(moves, np.int32)]
        flat = [part.ravel() for part in parts]
        total = sum(map(len, flat))
        np.concatenate(flat, out=region.array(0, (total,), "int32"))
        return total

    def read(self, region: Region, total: int) -> StepBatch:
        """The step that ``write`` put there, in arrays of its own."""
        memory: IntArray = region.array(0, (total,), "int32").astype(np.int32)
        count = 6 + 2 * len(paged(self.caches))
        start = 2 * count + 3
        *sizes, graph, outputs, moves = memory[:start].tolist()
        arrays = list[IntArray]()
        for index in range(count):
            rows, columns = sizes[2 * index : 2 * index + 2]
            size = rows * columns if self._is_table(index) else rows
            array = memory[start : start + size]
            arrays.append(array.reshape(rows, columns) if self._is_table(index) else array)
            start += size
        name = [*self.graphs][graph]
        token_ids, positions, query_start, context_len, logits_rows, slots, *rest = arrays
        pages = zip(rest[::2], rest[1::2], strict=True)
        return StepBatch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            context_len=context_len,
            logits_rows=logits_rows,
            sampling=[],
            slots=slots,
            sampling_slots=np.empty(0, np.int32),
            pages={
                cache.name: PagedInputs(*found)
                for cache, found in zip(paged(self.caches), pages, strict=True)
            },
            graph=name,
            outputs=tuple(
                each for bit, each in enumerate(self._outputs(name)) if outputs >> bit & 1
            ),
            moves=[*self._moves(memory[start : start + 3 * moves])],
        )

    def _arrays(self, batch: StepBatch) -> Iterator[IntArray]:
        yield from (batch.token_ids, batch.positions, batch.query_start, batch.context_len)
        yield from (batch.logits_rows, batch.slots)
        for cache in paged(self.caches):
            yield from (batch.pages[cache.name].page_table, batch.pages[cache.name].slot_mapping)

    @staticmethod
    def _is_table(index: int) -> bool:
        """Whether that array has two axes: every other one after the first six."""
        return index >= 6 and index % 2 == 0

    def _outputs(self, graph: str) -> list[str]:
        return [output.name for output in self.graphs[graph].outputs]

    def _moves(self, numbers: IntArray) -> Iterator[Move]:
        for cache, source, destination in numbers.reshape(-1, 3).tolist():
            yield Move(self.caches[cache].name, source, destination)
