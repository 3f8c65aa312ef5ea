"""How a thread becomes one of the ranks that its sessions exchange values with."""

from __future__ import annotations

import ctypes
import mmap

from slipstream.plugins import library

_LINE = 64  # bytes of a rank's line in ``cpu/ranks.h``


def memory_size(ranks: int, slot_bytes: int) -> int:
    """Bytes of the memory that so many ranks map, for pieces of ``slot_bytes``."""
    return ranks * (_LINE + 2 * slot_bytes)


def join(memory: mmap.mmap, rank: int, ranks: int) -> None:
    """Make the calling thread a rank; the memory, of ``memory_size``, began as zeros for all of
    them, and must outlive the thread's sessions."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _join(ctypes.c_void_p(address), len(memory), rank, ranks)


def leave() -> None:
    """Make the calling thread no rank."""
    _join(None, 0, 0, 0)


def turns(memory: mmap.mmap, ranks: int) -> list[int]:
    """How often each rank has met the others, modulo 2^32; any process may ask."""
    return [
        int.from_bytes(memory[rank * _LINE : rank * _LINE + 4], "little") for rank in range(ranks)
    ]


def _join(memory: ctypes.c_void_p | None, size: int, rank: int, ranks: int) -> None:
    function = library.load().slipstream_join_ranks
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    assert function(memory, size, rank, ranks) == 0, f"{size} bytes hold no slots of {ranks} ranks"
