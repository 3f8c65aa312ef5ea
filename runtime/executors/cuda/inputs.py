"""A step's arrays on their way to the device: one block, one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.builder.contract import Dim, Port, Source
from slipstream.plugins.paged_attention.cuda import StepTensors
from slipstream.runtime.engine.step import IntArray, StepBatch, reader_of
from slipstream.runtime.executors.cuda.device import Device, Event
from slipstream.runtime.executors.cuda.program import Step

_ALIGNMENT = 32  # int32s: every array starts a cache line, so that kernels compile once
_IN_FLIGHT = 3  # two steps on the device and one being written


@dataclass(frozen=True)
class Shape:
    """Sizes to which a step is padded: tokens, sequences, blocks of queries and rows of logits."""

    tokens: int
    sequences: int
    blocks: int = 0
    rows: int = 0

    @cached_property
    def sizes(self) -> dict[Dim, int]:
        """By the dimensions of a contract, and B for blocks."""
        return {
            "T": self.tokens,
            "S": self.sequences,
            "S+1": self.sequences + 1,
            "L": self.rows,
            "B": self.blocks,
        }


padded_shape = lru_cache(maxsize=256)(Shape)


@dataclass(frozen=True, slots=True)
class Field:
    """A one-dimensional array of a step, and what stands where it is padded; ``read`` is None
    where the block makes it."""

    name: str
    dim: Dim
    padding: int = 0
    read: Callable[[StepBatch], IntArray] | None = None


# What kernels read beside the inputs of the graph.
_TOKEN_SLOTS = Field("token_slots", "T")
_BLOCK_SEQUENCE = Field("block_sequence", "B", padding=-1)
_BLOCK_START = Field("block_start", "B")


class Layout:
    """Which arrays of a step lie in the block, and where: what the inputs of a graph with one paged
    cache take, then what kernels want beside; ``columns`` is the width of its page table."""

    def __init__(self, inputs: Iterable[Port], columns: int) -> None:
        ports = {port.source: port for port in inputs if port.source is not Source.CACHE}
        self.table = ports.pop(Source.PAGE_TABLE)
        self.read_table = reader_of(self.table)
        self.columns = columns
        self.ports = ports
        fields = [*map(_field, ports.values()), _TOKEN_SLOTS, _BLOCK_SEQUENCE, _BLOCK_START]
        self.fields = {field.name: field for field in fields}
        self._offsets: dict[Shape, dict[str, int]] = {}

    def offsets(self, shape: Shape) -> dict[str, int]:
        """Where each array starts in the block; the page table is the last."""
        offsets = self._offsets.get(shape)
        if offsets is None:
            offsets, start = {}, 0
            for name, field in self.fields.items():
                offsets[name] = start
                start += -(-shape.sizes[field.dim] // _ALIGNMENT) * _ALIGNMENT
            offsets[self.table.name] = start
            self._offsets[shape] = offsets
        return offsets

    def size(self, shape: Shape) -> int:
        """All of the block that a step takes."""
        return self.offsets(shape)[self.table.name] + shape.sequences * self.columns


def _field(port: Port) -> Field:
    padding = -1 if port.source is Source.SLOT_MAPPING else 0
    # Rows come one by one: only those that the device samples are wanted.
    read = None if port.source is Source.LOGITS_ROWS else reader_of(port)
    return Field(port.name, port.shape[0], padding, read)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of query tokens: the sequence of each, and the first of its queries inside."""

    sequence: IntArray
    start: IntArray


def query_blocks(batch: StepBatch, first: int, size: int) -> Blocks:
    """The blocks of ``size`` queries of all sequences from ``first`` on, longest contexts first."""
    counts = np.diff(batch.query_start)[first:]
    blocks = -(-counts // size)
    sequence = np.repeat(np.arange(first, first + len(counts), dtype=np.int32), blocks)
    ends = np.cumsum(blocks)
    index = np.arange(len(sequence)) - np.repeat(ends - blocks, blocks)
    start = (index * size).astype(np.int32)
    seen = (batch.context_len[first:] - counts)[sequence - first] + start
    order = np.argsort(-seen, kind="stable")
    return Blocks(sequence[order], start[order])


class StepInputs:
    """The block on the device, and pinned copies of it that the host writes in turn."""

    def __init__(self, device: Device, layout: Layout, largest: Shape) -> None:
        self._layout = layout
        self._rows = layout.ports[Source.LOGITS_ROWS].name
        size = layout.size(largest)
        self._block = torch.zeros(size, dtype=torch.int32, device=device.torch)
        self._hosts = [
            _Host(device.pinned((size,), torch.int32), Event(device)) for _ in range(_IN_FLIGHT)
        ]

    def load(self, batch: StepBatch, shape: Shape, blocks: Blocks, rows: IntArray) -> None:
        """Enqueue the copy of a step, padded to ``shape``."""
        host = self._hosts[0]
        self._hosts = [*self._hosts[1:], host]
        host.copied.wait()
        layout, offsets = self._layout, self._layout.offsets(shape)
        made = {
            self._rows: rows,
            _TOKEN_SLOTS.name: np.repeat(batch.slots, np.diff(batch.query_start)),
            _BLOCK_SEQUENCE.name: blocks.sequence,
            _BLOCK_START.name: blocks.start,
        }
        for name, field in layout.fields.items():
            array = made[name] if field.read is None else field.read(batch)
            start, end = offsets[name], offsets[name] + shape.sizes[field.dim]
            host.array[start : start + len(array)] = array
            host.array[start + len(array) : end] = field.padding
        start, size = offsets[layout.table.name], layout.size(shape)
        padded = host.array[start:size].reshape(shape.sequences, layout.columns)
        table = layout.read_table(batch)
        count, width = table.shape
        padded[:count, :width] = table
        self._block[:size].copy_(host.tensor[:size], non_blocking=True)
        host.copied.record()

    def clear(self) -> None:
        """Make the block, whatever its shape, a step of sequences without tokens or context.

        For compiling and capturing before any page is owned: slot 0 may be written to.
        """
        self._block.zero_()

    def step(self, shape: Shape, num_decodes: int, *, pdl: bool) -> Step:
        """The arrays of a step of this shape, as views of the block."""
        layout, offsets = self._layout, self._layout.offsets(shape)
        views = {
            name: self._block[offsets[name] : offsets[name] + shape.sizes[field.dim]]
            for name, field in layout.fields.items()
        }
        table = self._block[offsets[layout.table.name] : layout.size(shape)]
        of = {source: views[port.name] for source, port in layout.ports.items()}
        attention = StepTensors(
            query_start=of[Source.QUERY_START],
            context_len=of[Source.CONTEXT_LEN],
            page_table=table.view(shape.sequences, layout.columns),
            slot_mapping=of[Source.SLOT_MAPPING],
            block_sequence=views[_BLOCK_SEQUENCE.name],
            block_start=views[_BLOCK_START.name],
            num_decodes=num_decodes,
        )
        return Step(views, views[_TOKEN_SLOTS.name], attention, pdl)

    def logits_rows(self, shape: Shape) -> torch.Tensor:
        """The token rows whose logits are wanted ``[rows]``."""
        start = self._layout.offsets(shape)[self._rows]
        return self._block[start : start + shape.rows]


class _Host:
    """A pinned copy of the block, and when the device has read it."""

    def __init__(self, tensor: torch.Tensor, copied: Event) -> None:
        self.tensor = tensor
        self.array: NDArray[np.int32] = tensor.numpy()
        self.copied = copied
