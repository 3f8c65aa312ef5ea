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
    PROGRAMS,
    Norm,
    Operands,
    Room,
    rows_at_once,
)
from slipstream.plugins.collectives.cuda.layout import SLOTS
from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.cuda.precompile import recording

# Processors that a sum leaves to the kernel that tells of copies, which others wait for.
_SPARE = 4


@dataclass(frozen=True, slots=True)
class Pieces:
    """x of ``least`` bytes and more goes in pieces of about ``size`` bytes, and of a multiple of
    ``rows``: products of fewer rows at a time would be slower."""

    least: int = 32 << 20
    size: int = 16 << 20
    rows: int = 256

    def rows_of(self, rows: int, row_bytes: int, most: int) -> int:
        """How many of so many rows a piece has, of which there may be at most so many."""
        count = min(max(rows * row_bytes // self.size, 1), most)
        return -(-rows // count // self.rows) * self.rows


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
        device = room.peers.device
        self._room, self._pieces = room, pieces or Pieces()
        self._memories = memories
        self._heard = torch.zeros((SLOTS, PROGRAMS), dtype=torch.int32, device=device)
        self._told = torch.zeros((SLOTS, 4), dtype=torch.int32, device=device)  # aligned
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slot = 0

    def begin(self, rows: int, width: int, dtype: torch.dtype) -> Sending | None:
        """Room for such x, which is to be filled and sent piece by piece, and then added up; None
        where it goes another way: it is small, or larger than there is room for, or calls are
        captured, since it is the host that says which slot is free."""
        row = width * dtype.itemsize
        size, layout = rows * row, self._room.layout
        piece = self._pieces.rows_of(rows, row, layout.pieces)
        whole = dtype.itemsize == 2 and piece * row % CHUNK_BYTES == 0 and row % 4 == 0
        if not (whole and self._pieces.least <= size <= layout.copied):
            return None
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            return None
        if not recording():  # which other ranks may do without
            self._slot = (self._slot + 1) % SLOTS
        x = torch.empty(rows, width, dtype=dtype, device=self._room.peers.device)
        return Sending(self, x, self._slot, piece)

    def send(self, sending: Sending, piece: int) -> None:
        """Copy a piece to all other ranks, when it has been computed, and tell them."""
        room, slot = self._room, sending.slot
        layout = room.layout
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):  # None changes nothing
            if self._memories and not recording():
                self._copy(sending, piece)
            kernels.tell_kernel[(1,)](
                room.peers,
                self._told[slot],
                room.rank,
                layout.copy_flags_of(slot),
                piece,
                SIZE=layout.ranks,
                **launch_options(num_warps=1),
            )

    def reduce(self, sending: Sending, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
        """As ``exchange.reduce``, of what was sent."""
        room, x, slot = self._room, sending.x, sending.slot
        layout = room.layout
        y, total = torch.empty_like(x), None if norm is None else torch.empty_like(x)
        of = Operands.of(x, norm, y, total)
        rows, _, _ = of.shape
        grid = max(1, min(rows, room.programs - _SPARE))
        kernels.copied_kernel[(grid,)](
            *of.tensors,
            room.peers,
            self._heard[slot],
            room.rank,
            *of.shape[::2],
            layout.copy_stride,
            layout.copies_of(slot),
            layout.copy_flags_of(slot),
            sending.piece * x.shape[1] // 2 // of.shape[1],  # rows as the kernel sees them
            0.0 if norm is None else norm.epsilon,
            ROWS=rows_at_once(triton.cdiv(rows, grid), of.block),
            **of.options(layout.ranks),
        )
        if self._stream is not None:  # which reads x
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return y, total

    def _copy(self, sending: Sending, piece: int) -> None:
        room = self._room
        layout = room.layout
        part = sending.parts[piece]
        words = sending.x[part].view(-1).view(torch.uint8)
        begin = layout.copies_of(sending.slot) + room.rank * layout.copy_stride * 4
        begin += part.start * sending.x.shape[1] * sending.x.element_size()
        for ahead in range(1, layout.ranks):
            peer = self._memories[(room.rank + ahead) % layout.ranks]
            peer[begin : begin + len(words)].copy_(words, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Sending:
    """x ``[rows, width]`` on its way, ``piece`` rows at a time."""

    copies: Copies
    x: Tensor
    slot: int
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
