"""Memory of a GPU that the GPUs of all ranks read and write (torch's symmetric memory)."""

from __future__ import annotations

import re
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch._C._distributed_c10d import Store, _register_process_group, _SymmetricMemory

from slipstream.plugins.collectives.cuda.multicast import leave_multicast_off

_ABANDONED = 0xFF  # every byte of a turn that none is, see ``kernels.py``


class CountedAnew(Store):
    """The store of a group, where a process that exchanged handles in others before does so.

    Torch names exchanges by how many there were in the life of a process, so that it would wait for
    ever for ranks that are younger: a second engine has new ones. Here they are counted from the
    first that comes.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._first: int | None = None

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        """See torch's."""
        self._store.set(self._renamed(key), value)  # type: ignore[arg-type]  # it takes both

    def get(self, key: str) -> bytes:
        """See torch's."""
        value: bytes = self._store.get(self._renamed(key))
        return value

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        """See torch's."""
        self._store.wait([self._renamed(key) for key in keys], *timeout)

    def _renamed(self, key: str) -> str:
        found = re.fullmatch(r"(.*/)(\d+)(/\d+)", key)
        if found is None:
            return key
        number = int(found[2])
        if self._first is None:
            self._first = number
        return f"{found[1]}{number - self._first}{found[3]}"


_names: dict[str, str] = {}  # by those of groups there were in the life of this process
# What torch has by them, but does not keep as objects of Python.
_kept: list[tuple[dist.ProcessGroup, CountedAnew]] = []


def exchanging(group: dist.ProcessGroup) -> str:
    """The name of the group by which symmetric memory exchanges handles between the ranks of this
    one: its own where this process has had no other, which is as old as the others then."""
    name = group.group_name
    if name not in _names:
        _names[name] = _counted_anew(group) if _names else name
    return _names[name]


def _counted_anew(group: dist.ProcessGroup) -> str:
    """The name of another group of the same ranks, made for that."""
    name = f"{group.group_name} counted anew"
    store = CountedAnew(dist.distributed_c10d._get_process_group_store(group))
    same = dist.ProcessGroup(store, group.rank(), group.size())
    _kept.append((same, store))
    _register_process_group(name, same)  # type: ignore[arg-type]
    # Where some versions of torch look instead.
    symmetric_memory._group_name_to_store[name] = store
    _SymmetricMemory.set_group_info(name, group.rank(), group.size(), store)
    return name


class SharedMemory:
    """``size`` bytes on each rank, zeros at first; making it is a collective call.

    ``addresses`` int64 ``[ranks]``, on the device, are where this rank sees them, ``views`` the
    same as tensors. It lives as long as this object does.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        leave_multicast_off()
        self._memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self._memory.fill_(_ABANDONED)  # so that what fills it is loaded when it must not wait
        self._memory.zero_()
        self._beside = torch.cuda.Stream(device)
        handle = symmetric_memory.rendezvous(self._memory, exchanging(group))  # type: ignore[arg-type]
        self.views = [
            self._memory if peer == rank else handle.get_buffer(peer, (size,), torch.uint8)
            for peer in range(group.size())
        ]
        self._handle = handle
        places = [view.data_ptr() for view in self.views]
        self.addresses = torch.tensor(places, dtype=torch.int64, device=device)
        # Nobody writes before everybody's zeros are there.
        torch.cuda.synchronize(device)
        dist.barrier(group=group, device_ids=[device.index])

    def abandon(self) -> None:
        """Let kernels here that wait for other ranks end, and all that come: nobody writes any
        more. What they make means nothing. From any thread, without waiting for the device."""
        with torch.cuda.stream(self._beside):
            self._memory.fill_(_ABANDONED)
