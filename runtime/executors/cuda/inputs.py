"""A step's arrays on their way to the device: one block, one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.builder.contract import Dim, Port, Source
from slipstream.plugins.cuda.binding import Step
from slipstream.plugins.paged_attention.cuda.attention import StepTensors
from slipstream.runtime.engine.step import IntArray, StepBatch, reader_of
from slipstream.runtime.executors.cuda.device import Device, Event

_ALIGNMENT = 32  # int32s: every array starts a cache line, so that kernels compile once
_IN_FLIGHT = 3  # two steps on the device and one being written


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes to which a step is padded: tokens, sequences, blocks of queries and rows of logits.

    Without rows it is a step of decodes, whose logits are all wanted, of up to ``queries`` tokens
    each. Of others up to ``decodes`` of the first sequences may be decodes for the kernel that is
    for those.
    """

    tokens: int
    sequences: int
    blocks: int = 0
    rows: int = 0
    queries: int = 1
    decodes: int = 0

    @property
    def sizes(self) -> dict[Dim, int]:
        """By the dimensions of a contract, and B for blocks."""
        return {
            "T": self.tokens,
            "S": self.sequences,
            "S+1": self.sequences + 1,
            "L": self.rows,
            "B": self.blocks,
        }


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
_DECODE_LEN = Field("decode_len", "S")
_OF_ATTENTION = (_BLOCK_SEQUENCE, _BLOCK_START, _DECODE_LEN)
# What a head reads of a step: the token after each, or -1 - the row that samples it, the first row
# that each sequence samples, how many of its tokens are drafts, and how many its pages hold.
NEXT_IDS, FIRST_ROWS, NUM_DRAFTS, CAPACITY = "next_ids", "first_rows", "num_drafts", "capacity"
_OF_HEADS = (
    Field(NEXT_IDS, "T"),
    Field(FIRST_ROWS, "S", padding=-1),
    Field(NUM_DRAFTS, "S"),
    Field(CAPACITY, "S"),
)


@dataclass(frozen=True, slots=True)
class Places:
    """Begin and end of every array in the block, by name, and of the page tables behind them."""

    spans: dict[str, tuple[int, int]]
    tables: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Where the last page table ends."""
        return max(end for _, end in self.tables.values())


class Layout:
    """Which arrays of a step lie in the block, and where: what the inputs of a graph with paged
    caches take, then what kernels want beside; ``columns`` is the width of a page table and
    ``query_block`` the size of blocks of queries. ``guesses``: a head reads the step, too."""

    def __init__(
        self, inputs: Iterable[Port], columns: int, query_block: int, guesses: bool = False
    ) -> None:
        ports = [port for port in inputs if port.source is not Source.CACHE]
        self.tables = {port.name: port for port in ports if port.source is Source.PAGE_TABLE}
        self.read_tables = {name: reader_of(port) for name, port in self.tables.items()}
        self.columns, self.query_block = columns, query_block
        flat = [port for port in ports if port.source is not Source.PAGE_TABLE]
        self.names = {(port.source, port.cache): port.name for port in flat}
        fields = [*map(_field, flat), _TOKEN_SLOTS, *_OF_ATTENTION]
        self.guesses = guesses
        fields += _OF_HEADS if guesses else ()
        self.fields = {field.name: field for field in fields}
        self.places = lru_cache(maxsize=256)(self._places)  # of a shape, computed once

    def _places(self, shape: Shape) -> Places:
        spans, start = {}, 0
        for name, field in self.fields.items():
            end = start + shape.sizes[field.dim]
            spans[name] = (start, end)
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        tables = {}
        for name in self.tables:
            end = start + shape.sequences * self.columns
            tables[name] = (start, end)
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        return Places(spans, tables)


def _field(port: Port) -> Field:
    padding = -1 if port.source is Source.SLOT_MAPPING else 0
    # Rows come one by one: only those that the device samples are wanted.
    read = None if port.source is Source.LOGITS_ROWS else reader_of(port)
    return Field(port.name, port.shape[0], padding, read)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of query tokens: the sequence of each, and the first of its queries inside. Sequences
    before ``first`` are in none."""

    sequence: IntArray
    start: IntArray
    first: int = 0


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
    return Blocks(sequence[order], start[order], first)


class StepInputs:
    """The block on the device, and pinned copies of it that the host writes in turn."""

    def __init__(self, device: Device, layout: Layout, largest: Shape) -> None:
        self._layout = layout
        self._rows = layout.names[Source.LOGITS_ROWS, None]
        size = layout.places(largest).size
        self._block = torch.zeros(size, dtype=torch.int32, device=device.torch)
        self._hosts = [
            _Host(device.pinned((size,), torch.int32), Event(device)) for _ in range(_IN_FLIGHT)
        ]

    def load(self, batch: StepBatch, shape: Shape, blocks: Blocks, rows: IntArray) -> None:
        """Enqueue the copy of a step, padded to ``shape``; ``rows`` are those that it samples."""
        host = self._hosts[0]
        self._hosts = [*self._hosts[1:], host]
        host.copied.wait()
        layout, places = self._layout, self._layout.places(shape)
        made = {
            self._rows: rows if shape.rows else rows[:0],
            _TOKEN_SLOTS.name: np.repeat(batch.slots, np.diff(batch.query_start)),
            _BLOCK_SEQUENCE.name: blocks.sequence,
            _BLOCK_START.name: blocks.start,
            _DECODE_LEN.name: batch.context_len[: blocks.first],
        }
        if layout.guesses:
            made |= _for_heads(batch, rows)
        for name, field in layout.fields.items():
            array = made[name] if field.read is None else field.read(batch)
            start, end = places.spans[name]
            host.array[start : start + len(array)] = array
            host.array[start + len(array) : end] = field.padding
        for name, (start, end) in places.tables.items():
            padded = host.array[start:end].reshape(shape.sequences, layout.columns)
            table = layout.read_tables[name](batch)
            count, width = table.shape
            padded[:count, :width] = table
        self._block[: places.size].copy_(host.tensor[: places.size], non_blocking=True)
        host.copied.record()

    def clear(self) -> None:
        """Make the block, whatever its shape, a step of sequences without tokens or context.

        For compiling and capturing before any page is owned: slot 0 may be written to.
        """
        self._block.zero_()

    def pad(self, shape: Shape) -> None:
        """Make the block a step of this shape of nothing but padding, which writes nowhere."""
        self.clear()
        places = self._layout.places(shape)
        for name, field in self._layout.fields.items():
            self._block[slice(*places.spans[name])].fill_(field.padding)

    def step(
        self, shape: Shape, num_decodes: int, *, pdl: bool, query_block: int | None = None
    ) -> Step:
        """The arrays of a step of this shape, as views of the block; ``query_block`` where blocks
        of queries are smaller than usual."""
        layout, places = self._layout, self._layout.places(shape)
        views = {name: self._block[start:end] for name, (start, end) in places.spans.items()}
        of = {key: views[name] for key, name in layout.names.items()}
        attention = {
            name: StepTensors(
                query_start=of[Source.QUERY_START, None],
                context_len=of[Source.CONTEXT_LEN, None],
                page_table=self._block[slice(*span)].view(shape.sequences, layout.columns),
                slot_mapping=of[Source.SLOT_MAPPING, layout.tables[name].cache],
                block_sequence=views[_BLOCK_SEQUENCE.name],
                block_start=views[_BLOCK_START.name],
                num_decodes=num_decodes,
                query_block=query_block or layout.query_block,
                queries=shape.queries,
                decode_len=views[_DECODE_LEN.name] if shape.decodes else None,
            )
            for name, span in places.tables.items()
        }
        return Step(views, views[_TOKEN_SLOTS.name], attention, pdl)

    def logits_rows(self, shape: Shape) -> torch.Tensor:
        """The token rows whose logits are wanted ``[rows]``."""
        return self._block[slice(*self._layout.places(shape).spans[self._rows])]


def num_decodes(batch: StepBatch) -> int:
    """How many sequences, from the first on, compute a single token."""
    longer = np.flatnonzero(np.diff(batch.query_start) != 1)
    return int(longer[0]) if len(longer) else len(batch.context_len)


def _for_heads(batch: StepBatch, rows: IntArray) -> dict[str, IntArray]:
    """What a head reads of a step that samples these rows."""
    ends, told = batch.query_start[1:] - 1, batch.guessing
    counts = np.array(batch.drafts, np.int32) if len(batch.drafts) else ends * 0
    following = np.empty_like(batch.token_ids)
    sampled = -1 - np.arange(len(rows), dtype=np.int32)
    if len(rows) == len(following):  # decodes
        return {
            NEXT_IDS: sampled,
            FIRST_ROWS: ends - counts,
            NUM_DRAFTS: counts,
            CAPACITY: ends * 0 if told is None else told.capacity,
        }
    following[:-1] = batch.token_ids[1:]
    following[ends] = 0 if told is None else np.maximum(told.next_tokens, 0)
    following[rows] = sampled
    firsts = ends - counts
    places = np.searchsorted(rows, firsts).astype(np.int32)
    found = np.append(rows, np.int32(-1))[np.minimum(places, len(rows))] == firsts
    return {
        NEXT_IDS: following,
        FIRST_ROWS: np.where(found, places, np.int32(-1)),
        NUM_DRAFTS: counts,
        CAPACITY: ends * 0 if told is None else told.capacity,
    }


class _Host:
    """A pinned copy of the block, and when the device has read it."""

    def __init__(self, tensor: torch.Tensor, copied: Event) -> None:
        self.tensor = tensor
        self.array: NDArray[np.int32] = tensor.numpy()
        self.copied = copied
