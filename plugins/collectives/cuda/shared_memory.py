"""Memory of a GPU that the GPUs of all ranks read and write (torch's symmetric memory)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from slipstream.plugins.collectives.cuda.multicast import leave_multicast_off

_ABANDONED = 0xFF  # every byte of a turn that none is, see ``kernels.py``


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
        handle = symmetric_memory.rendezvous(self._memory, group)
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
