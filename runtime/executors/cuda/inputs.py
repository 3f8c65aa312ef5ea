"""A step's arrays on their way to the device: one block, one copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.plugins.cuda.binding import Step
from slipstream.plugins.paged_attention.cuda.attention import StepTensors
from slipstream.runtime.engine.step import IntArray, StepBatch
from slipstream.runtime.executors.cuda.device import Device, Event

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
    def fields(self) -> dict[str, int]:
        """The one-dimensional arrays of a step and their lengths."""
        tokens = ("token_ids", "positions", "slot_mapping", "token_slots")
        blocks = ("block_sequence", "block_start")
        return {
            **dict.fromkeys(tokens, self.tokens),
            "query_start": self.sequences + 1,
            "context_len": self.sequences,
            **dict.fromkeys(blocks, self.blocks),
            "logits_rows": self.rows,
        }

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each array starts in the block; the page table is the last."""
        offsets, start = {}, 0
        for name, length in self.fields.items():
            offsets[name] = start
            start += -(-length // _ALIGNMENT) * _ALIGNMENT
        return {**offsets, "page_table": start}


padded_shape = lru_cache(maxsize=256)(Shape)  # a shape computes its places once


# What stands where a step is padded; everything else is zero there.
_PADDING = {"slot_mapping": -1, "block_sequence": -1}


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

    def __init__(self, device: Device, largest: Shape, page_columns: int) -> None:
        self._columns = page_columns
        size = largest.offsets["page_table"] + largest.sequences * page_columns
        self._block = torch.zeros(size, dtype=torch.int32, device=device.torch)
        self._hosts = [
            _Host(device.pinned((size,), torch.int32), Event(device)) for _ in range(_IN_FLIGHT)
        ]

    def load(self, batch: StepBatch, shape: Shape, blocks: Blocks, rows: IntArray) -> None:
        """Enqueue the copy of a step, padded to ``shape``."""
        host = self._hosts[0]
        self._hosts = [*self._hosts[1:], host]
        host.copied.wait()
        arrays = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "slot_mapping": batch.slot_mapping,
            "token_slots": np.repeat(batch.slots, np.diff(batch.query_start)),
            "query_start": batch.query_start,
            "context_len": batch.context_len,
            "block_sequence": blocks.sequence,
            "block_start": blocks.start,
            "logits_rows": rows,
        }
        for name, array in arrays.items():
            start, end = shape.offsets[name], shape.offsets[name] + shape.fields[name]
            host.array[start : start + len(array)] = array
            host.array[start + len(array) : end] = _PADDING.get(name, 0)
        start = shape.offsets["page_table"]
        size = start + shape.sequences * self._columns
        table = host.array[start:size].reshape(shape.sequences, self._columns)
        count, width = batch.page_table.shape
        table[:count, :width] = batch.page_table
        self._block[:size].copy_(host.tensor[:size], non_blocking=True)
        host.copied.record()

    def clear(self) -> None:
        """Make the block, whatever its shape, a step of sequences without tokens or context.

        For compiling and capturing before any page is owned: slot 0 may be written to.
        """
        self._block.zero_()

    def step(self, shape: Shape, num_decodes: int, *, pdl: bool) -> Step:
        """The arrays of a step of this shape, as views of the block."""
        views = {
            name: self._block[shape.offsets[name] : shape.offsets[name] + length]
            for name, length in shape.fields.items()
        }
        start = shape.offsets["page_table"]
        table = self._block[start : start + shape.sequences * self._columns]
        attention = StepTensors(
            query_start=views["query_start"],
            context_len=views["context_len"],
            page_table=table.view(shape.sequences, self._columns),
            slot_mapping=views["slot_mapping"],
            block_sequence=views["block_sequence"],
            block_start=views["block_start"],
            num_decodes=num_decodes,
        )
        return Step(views["token_ids"], views["positions"], views["token_slots"], attention, pdl)

    def logits_rows(self, shape: Shape) -> torch.Tensor:
        """The token rows whose logits are wanted ``[rows]``."""
        start = shape.offsets["logits_rows"]
        return self._block[start : start + shape.rows]


class _Host:
    """A pinned copy of the block, and when the device has read it."""

    def __init__(self, tensor: torch.Tensor, copied: Event) -> None:
        self.tensor = tensor
        self.array: NDArray[np.int32] = tensor.numpy()
        self.copied = copied
