"""Memory that the process of an engine and those of its ranks map."""

from __future__ import annotations

import math
import mmap
import os
import tempfile

import numpy as np
from numpy.typing import NDArray


class Region:
    """Bytes that several processes see; whoever writes makes it longer, the others follow.

    ``descriptor`` is the open file that other processes are given.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    @classmethod
    def make(cls, size: int = mmap.PAGESIZE) -> Region:
        """A new one, of zeros, that is gone with the last process that has it."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("slipstream-ranks")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return cls(descriptor)

    def map(self, size: int) -> mmap.mmap:
        """At least so many bytes of it."""
        if self._map is None or len(self._map) < size:
            whole = os.fstat(self.descriptor).st_size
            if whole < size:
                whole = max(size, 2 * whole)
                os.ftruncate(self.descriptor, whole)
            self._map = mmap.mmap(self.descriptor, whole)
        return self._map

    def array(self, offset: int, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
        """An array that lies there."""
        count = math.prod(shape)
        memory = self.map(offset + count * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype, count, offset).reshape(shape)

    def close(self) -> None:
        """Let go of the file; arrays that are still there keep the memory."""
        self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
