"""Memory of the host for pages of a CPU engine: a slot holds a page of every cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import CacheArray, CacheSpec, paged
from slipstream.errors import CapacityError
from slipstream.runtime.engine.host_pages import HostSpace, Transfer
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.executors.host_file import HostFile

_CACHE_LINE = 64
Arrays = Mapping[str, Sequence[NDArray[Any]]]
_Place = tuple[str, CacheArray, int, int]  # cache, array, its first byte and how many it has


class CPUHost:
    """The part of the CPU's executor that keeps pages on the host: an ``OffloadingExecutor``.

    A slot has the pages of all caches one after the other, each ``[layers, *shape]`` and at the
    start of a cache line. The file, if there is one, is that memory.
    """

    def __init__(self, caches: Sequence[CacheSpec], arrays: Arrays, fingerprint: str) -> None:
        """``arrays`` are those of every cache, once they are there."""
        self.stored = self.loaded = Traffic()
        self._specs, self._paged, self._engine = caches, arrays, fingerprint
        self._file: HostFile | None = None
        self._slots: dict[str, list[NDArray[Any]]] = {}

    def reserve_host(self, num_bytes: int, file: str | None) -> HostSpace:
        """Memory that costs something when it is first written, or a file. Raises CapacityError
        where no slot fits, and what ``HostFile`` raises."""
        places, slot_bytes = _places(self._specs)
        count = num_bytes // slot_bytes
        if count < 1:
            raise CapacityError(
                f"kv_offload_gib holds {num_bytes} bytes, and one page takes {slot_bytes}: raise"
                " --kv-offload-gib, or --kv-transfer-gib"
            )
        if file is not None:
            self._file = HostFile(Path(file), count, slot_bytes, self._engine)
        memory = _memory(count, slot_bytes) if self._file is None else self._file.data
        for cache, array, start, size in places:
            part = memory[:, start : start + size].view(_numpy_type(array.dtype))
            self._slots.setdefault(cache, []).append(part)
        return HostSpace(count, self._file, (memory,))

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy pages one after the other."""
        for each in transfers:
            began, size = time.perf_counter(), 0
            for array, slots in zip(self._paged[each.cache], self._slots[each.cache], strict=True):
                pages = array[:, each.page]
                slot = slots[each.slot].reshape(pages.shape)
                np.copyto(*((slot, pages) if each.stores else (pages, slot)))
                size += pages.nbytes
            self._count(each.stores, size, time.perf_counter() - began)

    def close_host(self) -> None:
        """Let go of memory and file."""
        self._slots.clear()
        if self._file is not None:
            self._file.close()
        self._file = None

    def _count(self, stores: bool, num_bytes: int, seconds: float) -> None:
        if stores:
            self.stored += Traffic(num_bytes, seconds)
        else:
            self.loaded += Traffic(num_bytes, seconds)


def _places(caches: Sequence[CacheSpec]) -> tuple[list[_Place], int]:
    """Where each array lies in a slot, and how many bytes that has."""
    places, start = list[_Place](), 0
    for cache in paged(caches):
        for array in cache.arrays:
            size = len(cache.layers) * array.nbytes
            places.append((cache.name, array, start, size))
            start += -(-size // _CACHE_LINE) * _CACHE_LINE
    return places, start


def _numpy_type(dtype: str) -> str:
    """Of what NumPy has no type for, the bytes."""
    return "uint8" if dtype == "float8_e4m3fn" else dtype


def _memory(count: int, slot_bytes: int) -> NDArray[np.uint8]:
    """Slots that cost memory when they are first written."""
    try:
        return np.zeros((count, slot_bytes), np.uint8)
    except (MemoryError, ValueError) as error:
        raise CapacityError(
            f"{count * slot_bytes} bytes for pages on the host cannot be had ({error}): lower"
            " --kv-offload-gib"
        ) from error
