"""How many completions a server has open, whichever of its processes answers them."""

from __future__ import annotations

import fcntl
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_ROW = 2  # numbers of a process: completions and requests


class Places:
    """Two numbers for each process of a server, in memory that all of them map.

    A process writes its own row only. Whoever takes places holds the lock of the file, which the
    system lets go of if the process dies.
    """

    def __init__(self, file: BinaryIO | None = None, rows: int = 1, row: int = 0) -> None:
        """The row of one process; without a ``file`` there is no other one."""
        size = 8 * _ROW * rows
        if file is not None:
            file.truncate(size)
        self._file = file
        self._numbers = memoryview(mmap.mmap(-1 if file is None else file.fileno(), size)).cast("q")
        self._row = _ROW * row

    @property
    def own(self) -> int:
        """Completions that this process has open."""
        return self._numbers[self._row]

    @property
    def taken(self) -> int:
        """Completions that are open in all processes."""
        return sum(self._numbers[::_ROW])

    @property
    def requests(self) -> int:
        """Requests that are open in all processes."""
        return sum(self._numbers[1::_ROW])

    def take(self, count: int, capacity: int) -> bool:
        """Open a request of so many completions; false, and nothing done, if there were more than
        ``capacity`` then."""
        with self._locked():
            if self.taken + count > capacity:
                return False
            self._add(count, 1)
            return True

    def give_back(self, count: int) -> None:
        """Close a request of so many completions."""
        self._add(-count, -1)

    def clear(self, row: int) -> None:
        """Close what a process has left that has ended."""
        self._numbers[_ROW * row] = self._numbers[_ROW * row + 1] = 0

    def _add(self, completions: int, requests: int) -> None:
        self._numbers[self._row] += completions
        self._numbers[self._row + 1] += requests

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
