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
_USUAL_PROGRAMS = 64  # fill NVLink between H200s: as quick as twice as many
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
    begin as zeros. At most ``programs`` of a kernel run at once.
    """

    rank: int
    layout: Layout
    peers: Tensor
    turns: Tensor
    programs: int = _USUAL_PROGRAMS


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


def fits(way: Way, room: Room, x: Tensor, norm: Norm | None = None) -> bool:
    """Whether there is room for x of every rank."""
    layout = room.layout
    rows, words, count = _shape(x, norm)
    if way is Way.LINES:
        return count <= layout.line_stride
    if way is Way.WORDS:
        return count <= layout.word_stride
    part = triton.cdiv(rows, layout.ranks) * words
    return count <= layout.whole_room and part <= layout.part_stride


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
    way: Way, room: Room, x: Tensor, norm: Norm | None = None, *, pdl: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The sum of x ``[rows, width]`` of all ranks; with a norm, that of the sum and the residual,
    and what it is the norm of."""
    layout = room.layout
    rows, words, count = _shape(x, norm)
    padded = _padded(x)
    y = torch.empty_like(padded)
    total = None if norm is None else torch.empty_like(padded)
    block = triton.next_power_of_2(words)
    common = (
        _words(padded),
        None if norm is None else _words(norm.residual.contiguous()),
        None if norm is None else _words(norm.weight),
        _words(y),
        None if total is None else _words(total),
        room.peers,
        room.turns,
        room.rank,
        rows,
        count,
    )
    options: dict[str, Any] = {
        "SIZE": layout.ranks,
        "WORDS": words,
        "BLOCK": block,
        "DTYPE": _DTYPES[x.dtype],
        "PDL": pdl,
        **launch_options(num_warps=_warps(block), pdl=pdl),
    }
    epsilon = 0.0 if norm is None else norm.epsilon
    if not count:
        pass
    elif way is Way.PARTS:
        places = (layout.part_stride, layout.word_room, layout.words, layout.whole, layout.flags)
        grid = min(triton.cdiv(rows, layout.ranks), room.programs)
        kernels.two_shot_kernel[(grid,)](*common, *places, epsilon, **options)
    else:
        grid = min(rows, room.programs)
        piece = _piece(triton.cdiv(rows, grid))
        kernels.one_shot_kernel[(grid,)](
            *common,
            *_inbox(way, layout),
            layout.flags,
            piece,
            epsilon,
            LINES=way is Way.LINES,
            **options,
        )
    whole = y if y.shape == x.shape else y[: x.numel()].view(x.shape)
    return whole, total


def _piece(rows: int) -> int:
    """Of so many rows of a program, how many are sent while as many before them are added up."""
    return triton.cdiv(rows, MEETINGS)


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
