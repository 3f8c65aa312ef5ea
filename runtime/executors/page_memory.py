"""Memory for KV pages: small pages of the system's at first, huge ones where they are full.

Every layer's pages lie in a region of their own, which fills from its start. Huge pages (2 MB) make
attention to long contexts a tenth faster, but each region would end in one that is half empty. So
the system is asked for small ones, and to put those together that are full; see madvise(2). Most
are full where a region begins with one (``whole_regions``).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HUGE = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python has no name for
_MOST_A_STEP = 8  # huge pages made at once: about 0.4 ms each
_CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class PageMemory:
    """Zeros that cost memory when they are first written.

    ``array`` is ``[layers, pages, *shape]`` of ``dtype`` and starts where a huge page may. It keeps
    the memory; this object only tells the system about it. MemoryError where it cannot be had.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self._layers, self._pages = shape[0], shape[1]
        self._page_bytes = size // max(1, self._layers * self._pages)
        self._used = 0  # pages of a layer
        self._full: list[int] = []  # addresses of what is to become a huge page
        self._map = _mapped(size + _HUGE)
        mapped = np.frombuffer(self._map, np.uint8)
        self._start = mapped.ctypes.data
        first = _aligned(self._start) - self._start
        self.array: NDArray[Any] = mapped[first : first + size].view(dtype).reshape(shape)

    def use(self, pages: int) -> None:
        """Steps write the first ``pages`` of each layer, or some of them."""
        if pages > self._used:
            self._full += self._filled(self._used, pages)
            self._used = pages
        if not self._full:
            return
        made, self._full = self._full[:_MOST_A_STEP], self._full[_MOST_A_STEP:]
        for address in made:
            _advise(self._map, mmap.MADV_HUGEPAGE, address - self._start, _HUGE)
            _advise(self._map, _COLLAPSE, address - self._start, _HUGE)

    def _filled(self, before: int, after: int) -> list[int]:
        """Where a huge page fits into ``after`` pages of a layer, and did not into ``before``."""
        if not _wanted():
            return []
        region = self._pages * self._page_bytes
        first = self.array.ctypes.data
        starts = range(first, first + self._layers * region, max(1, region))
        return [
            address
            for start in starts
            for address in range(
                max(_aligned(start), (start + before * self._page_bytes) // _HUGE * _HUGE),
                (start + after * self._page_bytes) // _HUGE * _HUGE,
                _HUGE,
            )
        ]


def whole_regions(pages: int, page_bytes: int) -> int:
    """So many pages of ``page_bytes`` a layer, ``pages`` at least, that every layer's begin where a
    huge page may; ``pages`` where that would double them. The others are never written."""
    step = _HUGE // math.gcd(_HUGE, page_bytes)
    more = -(-pages // step) * step
    return more if more < 2 * pages else pages


def free_bytes() -> int:
    """What the system counts as available."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return to the system what the allocator holds and nobody uses, as after files were read."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def _mapped(size: int) -> mmap.mmap:
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(-1, max(1, size))
        mapped = mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        _advise(mapped, mmap.MADV_NOHUGEPAGE, 0, max(1, size))
    return mapped


def _advise(mapped: mmap.mmap, advice: int, start: int, length: int) -> None:
    """Advice is free to be refused: by a kernel without huge pages, or with none left."""
    try:
        mapped.madvise(advice, start, length)
    except OSError:
        return


def _wanted() -> bool:
    """Whether the system makes huge pages where it is asked to."""
    try:
        return "[never]" not in _CHOICE.read_text()
    except OSError:
        return False


def _aligned(address: int) -> int:
    return -(-address // _HUGE) * _HUGE
