"""The kernels of ``kernels.py`` on tensors: one turn of all ranks each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import triton
from torch import Tensor

from slipstream.plugins.collectives.cuda import kernels
from slipstream.plugins.collectives.cuda.layout import Layout
from slipstream.plugins.cuda.launch import launch_options

PROGRAMS: int = kernels.PROGRAMS.value
MEETINGS: int = kernels.MEETINGS.value
_CHUNK = 1024  # words that a program has at a time, where there is no row that it must have
_WORD = 4  # bytes
CHUNK_BYTES = _CHUNK * _WORD
_AT_ONCE, _MOST_AT_ONCE = 8192, 4  # words of several rows, and these
# Of lines, each of which is waited for, few at once are quickest.
_LINE_PROGRAMS = 64
_DTYPES = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}


@dataclass(frozen=True, slots=True)
class Room:
    """What rank ``rank`` knows of the memory that all of them write, which lies as ``layout`` says.

    ``peers`` int64 ``[ranks]`` are the addresses of it in the order of the ranks, as this device
    sees them. ``turns`` int32 ``[PROGRAMS]`` is this rank's own. Both the memory and ``turns``
    begin as zeros. At most ``programs`` of a kernel run at once, each on a processor of its own.
    """

    rank: int
    layout: Layout
    peers: Tensor
    turns: Tensor
    programs: int = PROGRAMS


@dataclass(frozen=True, slots=True)
class Norm:
    """What becomes of a sum of rows ``[rows, width]``: ``residual`` of the same shape is added, and
    the result divided by its root mean square and multiplied by ``weight [width]``."""

    residual: Tensor
    weight: Tensor
    epsilon: float


def reducible(x: Tensor, norm: Norm | None) -> bool:
    """Whether the kernels add up such x: a norm is of whole words."""
    return x.dtype in _DTYPES and (
        norm is None or (x.dtype != torch.float32 and x.shape[1] % 2 == 0)
    )


@dataclass(frozen=True, slots=True)
class Operands:
    """What a kernel that adds up takes: ``tensors`` of words (x, residual, weight, y and total),
    and the ``shape`` in which it sees x: rows, words of one, and words in all."""

    tensors: tuple[Tensor | None, ...]
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, norm: Norm | None, y: Tensor, total: Tensor | None) -> Operands:
        """Of x in whole words."""
        residual = None if norm is None else _words(norm.residual.contiguous())
        weight = None if norm is None else _words(norm.weight)
        made = _words(y), None if total is None else _words(total)
        return cls((_words(x), residual, weight, *made), _shape(x, norm), x.dtype)

    @property
    def block(self) -> int:
        """Words of a row as the kernel has them."""
        return int(triton.next_power_of_2(self.shape[1]))

    def options(self, ranks: int) -> dict[str, Any]:
        """Constants of the kernel, and its warps."""
        return {
            "SIZE": ranks,
            "WORDS": self.shape[1],
            "BLOCK": self.block,
            "DTYPE": _DTYPES[self.dtype],
            **launch_options(num_warps=_warps(self.block)),
        }


class Way(Enum):
    """How x comes from every rank to every other.

    As LINES all of it goes at once, each word beside its turn: twice the bytes, and nobody waits
    but for them. As WORDS it goes at once, and then the ranks meet. In PARTS each rank adds up some
    rows and sends the sums, with a meeting after both; what is sent grows least with the ranks.
    Sums are the same to the bit.
    """

    LINES = auto()
    WORDS = auto()
    PARTS = auto()


def rows_that_fit(way: Way, room: Room, row_bytes: int) -> int:
    """For how many rows of x of every rank there is room."""
    layout, words = room.layout, -(-row_bytes // _WORD)
    if way is Way.LINES:
        return layout.line_stride // words
    if way is Way.WORDS:
        return layout.word_stride // words
    return min(layout.whole_room // words, layout.part_stride // words * layout.ranks)


def gather(way: Way, room: Room, x: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """Fill ``out [rows, ranks * width]`` with the columns of x ``[rows, width]`` of all ranks, in
    their order, as LINES or WORDS. A row is whole words."""
    words, wide = _words(x), _words(out)
    layout = room.layout
    if len(words):
        grid = min(triton.cdiv(len(words), _CHUNK), room.programs)
        kernels.gather_kernel[(grid,)](
            words,
            wide,
            room.peers,
            room.turns,
            room.rank,
            len(x),
            len(words) // len(x),
            *_inbox(way, layout),
            layout.flags,
            SIZE=layout.ranks,
            BLOCK=_CHUNK,
            LINES=way is Way.LINES,
            PDL=pdl,
            **launch_options(num_warps=_warps(_CHUNK), pdl=pdl),
        )


def reduce(
    way: Way,
    room: Room,
    x: Tensor,
    norm: Norm | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sum of x ``[rows, width]`` of all ranks; with a norm, that of the sum and the residual,
    and what it is the norm of. There is room for x. An ``out``, if given, is of whole words."""
    layout = room.layout
    padded = _padded(x)
    if out is None:
        out = torch.empty_like(padded), None if norm is None else torch.empty_like(padded)
    y, total = out
    of = Operands.of(padded, norm, y, total)
    rows, _, count = of.shape
    block = of.block
    common = (*of.tensors, room.peers, room.turns, room.rank, rows, count)
    options = of.options(layout.ranks) | launch_options(num_warps=_warps(block), pdl=pdl)
    options["PDL"] = pdl
    epsilon = 0.0 if norm is None else norm.epsilon
    if not count:
        pass
    elif way is Way.PARTS:
        places = (layout.part_stride, layout.word_room, layout.words, layout.whole, layout.flags)
        groups = triton.cdiv(rows, layout.ranks)
        grid = min(groups, room.programs)
        own = triton.cdiv(groups, grid)
        at_once = rows_at_once(own, block)
        piece = _piece(own, at_once, MEETINGS - 1)
        kernels.two_shot_kernel[(grid,)](*common, *places, piece, epsilon, ROWS=at_once, **options)
    else:
        lines = way is Way.LINES
        grid = min(rows, _LINE_PROGRAMS if lines else PROGRAMS, room.programs)
        own = triton.cdiv(rows, grid)
        at_once = 1 if lines else rows_at_once(own, block)
        piece = own if lines else _piece(own, at_once, MEETINGS)
        kernels.one_shot_kernel[(grid,)](
            *common,
            *_inbox(way, layout),
            layout.flags,
            piece,
            epsilon,
            ROWS=at_once,
            LINES=lines,
            **options,
        )
    whole = y if y.shape == x.shape else y[: x.numel()].view(x.shape)
    return whole, total


def rows_at_once(own: int, block: int) -> int:
    """How many of its ``own`` rows a program has at a time: as much as hides that memory is slow to
    answer."""
    return 1 if own == 1 else max(1, min(_MOST_AT_ONCE, _AT_ONCE // block))


def _piece(own: int, at_once: int, pieces: int) -> int:
    """Of its ``own`` rows, how many a program sends while as many before them are added up: in as
    many ``pieces`` at most."""
    most = -(-own // pieces)
    return -(-most // at_once) * at_once


def _inbox(way: Way, layout: Layout) -> tuple[int, int, int]:
    """The room of a sender and of a slot, and where the first slot begins."""
    if way is Way.LINES:
        return layout.line_stride, layout.line_room, layout.lines
    return layout.word_stride, layout.word_room, layout.words


def _shape(x: Tensor, norm: Norm | None) -> tuple[int, int, int]:
    """Rows, words of one, and words in all, as the kernels see them."""
    count = triton.cdiv(x.numel() * x.element_size(), _WORD)
    if norm is None:
        return triton.cdiv(count, _CHUNK), _CHUNK, count
    return len(x), x.shape[1] * x.element_size() // _WORD, count


def _padded(x: Tensor) -> Tensor:
    """x in whole words, one after the other."""
    x = x.contiguous()
    if x.numel() * x.element_size() % _WORD == 0:
        return x
    whole = x.new_zeros(x.numel() + 1)
    whole[:-1] = x.view(-1)
    return whole


def _words(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.int32)


def _warps(block: int) -> int:
    """Warps of a program that has so many words: 16 bytes a thread and load, up to 16 warps."""
    return min(max(block // 128, 1), 16)
