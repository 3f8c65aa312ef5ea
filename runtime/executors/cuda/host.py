"""Pages of a GPU on the host: pinned memory, and copies on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.builder.contract import CacheSpec
from slipstream.errors import CapacityError
from slipstream.runtime.engine.host_pages import HostSpace, Transfer
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.executors.cuda.device import CopyStream, Device, Event


@dataclass(frozen=True, slots=True)
class _Copy:
    """Copies of one sort that follow each other, between two points in the device's work."""

    stores: bool
    num_bytes: int
    began: Event
    ended: Event


class _Array(NamedTuple):
    """One cache's pages on the device, bytes ``[layers, pages, n]``, and on the host, ``[slots,
    layers, n]``."""

    device: Tensor
    host: Tensor


class CUDAHost:
    """Copies pages between the device and slots of the host, each the pages of all caches.

    A step waits for the copies before its layers. They wait for the step before only where one
    writes to the device: that step may still use what is overwritten. A page that is stored was
    there when its step landed, and nobody writes it before this step, so storing goes on beside
    the step before.
    """

    def __init__(self, device: Device, caches: Sequence[CacheSpec], num_bytes: int) -> None:
        """Raises CapacityError where no slot fits or the host has no such memory."""
        slot_bytes = sum(cache.bytes_per_page for cache in caches)
        count = num_bytes // slot_bytes
        if count < 1:
            raise CapacityError(
                f"kv_offload_gib holds {num_bytes} bytes, and one page takes {slot_bytes}: raise"
                " --kv-offload-gib, or --kv-transfer-gib"
            )
        self.stored = self.loaded = Traffic()
        self._stream = CopyStream(device)
        self._device = device
        self._host = {
            cache.name: device.locked((count, len(cache.layers), cache.arrays[0].nbytes))
            for cache in caches
        }
        parts = tuple(host.flatten(1).numpy() for host in self._host.values())
        self.space = HostSpace(count, parts=parts)
        self._on_their_way: deque[_Copy] = deque()

    def transfer(self, transfers: Sequence[Transfer], pages: Mapping[str, Tensor]) -> None:
        """Enqueue transfers in their order, and let what is enqueued from now on wait for them;
        ``pages`` are those of every cache on the device."""
        self._count()
        # A head that nobody asks has no pages.
        transfers = [each for each in transfers if each.cache in pages]
        if not transfers:
            return
        arrays = {name: _Array(_bytes(pages[name]), host) for name, host in self._host.items()}
        if not all(each.stores for each in transfers):
            self._stream.wait_for_work()
        with self._stream.work():
            for part in _runs(transfers):
                self._copy(part, arrays)
        self._stream.let_work_wait()

    def close(self) -> None:
        """Give the memory back; nothing is on its way."""
        self._on_their_way.clear()
        for host in self._host.values():
            self._device.unlock(host)
        self._host.clear()

    def _copy(self, transfers: Sequence[Transfer], arrays: Mapping[str, _Array]) -> None:
        """Enqueue transfers of one sort."""
        began, ended = Event(self._device, timed=True), Event(self._device, timed=True)
        began.record()
        size = 0
        for each in transfers:
            array = arrays[each.cache]
            page, slot = array.device[:, each.page], array.host[each.slot]
            if each.stores:
                slot.copy_(page, non_blocking=True)
            else:
                page.copy_(slot, non_blocking=True)
            size += slot.numel()
        ended.record()
        self._on_their_way.append(_Copy(transfers[0].stores, size, began, ended))

    def _count(self) -> None:
        """Take the copies that are over into account."""
        while self._on_their_way and self._on_their_way[0].ended.is_over():
            copy = self._on_their_way.popleft()
            traffic = Traffic(copy.num_bytes, copy.ended.seconds_since(copy.began))
            if copy.stores:
                self.stored += traffic
            else:
                self.loaded += traffic


def _bytes(pages: Tensor) -> Tensor:
    """Pages as bytes ``[layers, pages, n]``: there are no copies of 8-bit floats."""
    return pages.view(torch.uint8).flatten(2)


def _runs(transfers: Sequence[Transfer]) -> list[list[Transfer]]:
    """Transfers that follow each other and go the same way."""
    runs: list[list[Transfer]] = []
    for each in transfers:
        if not runs or runs[-1][0].stores != each.stores:
            runs.append([])
        runs[-1].append(each)
    return runs
