"""Sums of many rows whose x goes to the other ranks piece by piece, while more of it is computed.

The copy engines write it into the others' memory, so that no processor waits for NVLink: what is
left of a sum is to read what has come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from slipstream.plugins.collectives.cuda import kernels
from slipstream.plugins.collectives.cuda.exchange import (
    CHUNK_BYTES,
    Norm,
    Operands,
    Room,
    rows_at_once,
)
from slipstream.plugins.collectives.cuda.layout import SLOTS
from slipstream.plugins.cuda.precompile import recording

# Processors that a sum leaves to what tells of copies, which others wait for.
_SPARE = 4
_MOST_TURNS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Pieces:
    """x of ``least`` bytes and more goes in pieces of about ``size`` bytes, and of a multiple of
    ``rows``: as many as make a product of 4096 columns occupy all processors. Less work would not
    hide what the host does for each piece."""

    least: int = 48 << 20
    size: int = 24 << 20
    rows: int = 1024

    def rows_of(self, rows: int, row_bytes: int, most: int) -> int:
        """How many of so many rows a piece has, of which there may be at most so many."""
        count = min(-(-rows * row_bytes // self.size), most)
        return -(-rows // max(count, 1) // self.rows) * self.rows


class Copies:
    """The room for x that is copied, in the memory of all ranks (``Room``).

    ``memories`` uint8 ``[layout.bytes]`` are those of the ranks in their order, as this device
    reaches them; none where kernels are only planned. There are two slots, which sums take in
    turns: a rank copies into one again after it has heard, in the sum between, of every other rank,
    which each began that after it had read.
    """

    def __init__(
        self, room: Room, memories: Sequence[Tensor] = (), pieces: Pieces | None = None
    ) -> None:
        device, layout = room.peers.device, room.layout
        self._room, self._pieces = room, pieces or Pieces()
        others = [(room.rank + ahead) % layout.ranks for ahead in range(1, layout.ranks)]
        self._others = [memories[rank] for rank in others] if memories else []
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._computed, self._copied = torch.cuda.Event(), torch.cuda.Event()
        self._turn = 0
        size = layout.pieces * layout.ranks
        self._flags = [
            [
                memory[layout.copy_flags_of(slot) :][: 4 * size]
                .view(torch.int32)
                .view(layout.pieces, layout.ranks)[:, room.rank]
                for memory in self._others
            ]
            for slot in range(SLOTS)
        ]

    def begin(self, rows: int, width: int, dtype: torch.dtype) -> Sending | None:
        """Room for such x, which is to be filled and sent piece by piece, and then added up; None
        where it goes another way: it is small, or larger than there is room for, or calls are
        captured, since it is the host that counts turns and says which slot is free."""
        row = width * dtype.itemsize
        size, layout = rows * row, self._room.layout
        piece = self._pieces.rows_of(rows, row, layout.pieces)
        whole = dtype.itemsize == 2 and piece * row % CHUNK_BYTES == 0 and row % 4 == 0
        if not (whole and self._pieces.least <= size <= layout.copied):
            return None
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            return None
        if not recording():  # which other ranks may do without
            self._turn = self._turn % _MOST_TURNS + 1
        x = torch.empty(rows, width, dtype=dtype, device=self._room.peers.device)
        return Sending(self, x, self._turn, piece)

    def send(self, sending: Sending, piece: int) -> None:
        """Copy a piece to all other ranks, when it has been computed, and tell them."""
        if recording():
            return
        x, slot, layout = sending.x, sending.turn % SLOTS, self._room.layout
        bytes_of_row = x.shape[1] * x.element_size()
        first = piece * sending.piece
        words = x[first : first + sending.piece].view(-1).view(torch.uint8)
        begin = layout.copies_of(slot) + self._room.rank * layout.copy_stride * 4
        begin += first * bytes_of_row
        if self._stream is not None:
            self._computed.record()
            self._stream.wait_event(self._computed)
        with torch.cuda.stream(self._stream):  # None changes nothing
            for other, flags in zip(self._others, self._flags[slot], strict=True):
                other[begin : begin + len(words)].copy_(words, non_blocking=True)
                flags[piece].fill_(sending.turn)  # a kernel, which begins when that is there

    def reduce(self, sending: Sending, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
        """As ``exchange.reduce``, of what was sent."""
        room, x, slot = self._room, sending.x, sending.turn % SLOTS
        layout = room.layout
        y, total = torch.empty_like(x), None if norm is None else torch.empty_like(x)
        of = Operands.of(x, norm, y, total)
        rows, words, count = of.shape
        grid = max(1, min(rows, room.programs - _SPARE))
        kernels.copied_kernel[(grid,)](
            *of.tensors,
            room.peers,
            sending.turn,
            room.rank,
            rows,
            count,
            layout.copy_stride,
            layout.copies_of(slot),
            layout.copy_flags_of(slot),
            sending.piece * x.shape[1] // 2 // words,  # rows as the kernel sees them
            0.0 if norm is None else norm.epsilon,
            ROWS=rows_at_once(triton.cdiv(rows, grid), of.block),
            **of.options(layout.ranks),
        )
        if self._stream is not None:  # which reads x
            self._copied.record(self._stream)
            torch.cuda.current_stream(x.device).wait_event(self._copied)
        return y, total


@dataclass(frozen=True, slots=True)
class Sending:
    """x ``[rows, width]`` on its way in this ``turn``, ``piece`` rows at a time."""

    copies: Copies
    x: Tensor
    turn: int
    piece: int

    @property
    def parts(self) -> list[slice]:
        """The rows of every piece."""
        rows = range(0, len(self.x), self.piece)
        return [slice(first, min(first + self.piece, len(self.x))) for first in rows]

    def filling(self) -> Iterator[slice]:
        """The rows of one piece after the other, which are sent when the next is asked for."""
        for piece, part in enumerate(self.parts):
            yield part
            self.copies.send(self, piece)
