"""What the executor of one rank has of the others."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from slipstream.errors import ExecutionError
from slipstream.plugins.collectives.cuda.communicator import Communicator
from slipstream.runtime.executors.cuda.device import Device

# Of what goes through memory that all GPUs reach: steps of many tokens of wide models.
_MAX_BYTES = 64 << 20
_PATIENCE = timedelta(seconds=30)  # until the slowest has come to where all meet
# Who notices that a rank is lost is watching here; torch's own watch would end this process.
_SWITCHES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_GLANCE = 1e-3  # seconds between two looks at what others say


class Team:
    """Ranks that have met: they make the same calls in the same order."""

    def __init__(
        self, rank: int, size: int, device: Device, meeting: Path, watch: Callable[[], None]
    ) -> None:
        """Meet the others at a file. ``watch`` is called while the host waits for them, and raises
        why that is in vain.

        Raises ExecutionError where this process has a process group of torch's already, and where
        they do not meet within half a minute.
        """
        if dist.is_initialized():
            raise ExecutionError(
                "this process belongs to a torch.distributed group already, so that it cannot be a"
                " rank of an engine: load one engine of several ranks, in a process of its own"
            )
        for name, value in _SWITCHES.items():
            os.environ.setdefault(name, value)
        self.rank, self._size, self._watch = rank, size, watch
        self._store, self._asked = dist.FileStore(str(meeting), size), 0  # type: ignore[attr-defined]
        # Symmetric memory remembers for good by which store a group of a name exchanges handles: a
        # name that was another's in this process would have it wait there.
        dist.distributed_c10d._world.group_count = zlib.crc32(str(meeting).encode())
        self.meet()  # one that is slow to import what it needs is waited for while it lives
        try:
            dist.init_process_group(
                "nccl" if device.is_cuda else "gloo",
                store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=rank,
                world_size=size,
                timeout=_PATIENCE,
            )
            with device.work():
                group = dist.group.WORLD
                assert group is not None
                self.communicator = Communicator(rank, size, device.torch, _MAX_BYTES, group)
        except RuntimeError as error:
            if dist.is_initialized():
                abort_group()
                dist.destroy_process_group()
            watch()  # which says it better
            raise ExecutionError(
                f"the {size} ranks could not meet: {error}. Load the engine again"
            ) from error

    @classmethod
    def planned(cls, size: int, device: Device) -> Team:
        """The first of ranks on a device that is only planned: what they launch is recorded."""
        team = cls.__new__(cls)
        team.rank, team._size = 0, size
        team.communicator = Communicator(0, size, device.torch, _MAX_BYTES, None)
        return team

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that samples."""
        return self.rank == 0

    def least(self, number: int) -> int:
        """The smallest of the numbers that ranks come with."""
        self._asked += 1
        self._store.set(f"{self._asked} of {self.rank}", str(number))
        keys = [f"{self._asked} of {rank}" for rank in range(self._size)]
        while not self._store.check(keys):
            self._watch()
            time.sleep(_GLANCE)
        return min(int(self._store.get(key)) for key in keys)

    def meet(self) -> None:
        """Wait until all ranks have come here."""
        self.least(0)

    def beside(self, x: Tensor, *, pdl: bool = False) -> Tensor:
        """The columns of x of all ranks, side by side; capturable."""
        return self.communicator.all_gather(x, pdl=pdl)

    def share(self, tokens: Tensor) -> None:
        """Give all ranks the ``tokens [slots]`` (int32) of the first; capturable."""
        (gathered,) = self.communicator.all_gather(tokens[None])
        if not self.is_first:
            tokens.copy_(gathered[: len(tokens)])

    def abandon(self) -> None:
        """Let what waits on this device for ranks that have ended come to an end. From any
        thread."""
        self.communicator.abandon()

    def close(self) -> None:
        """Part, when no call is on its way on any rank."""
        self.communicator.close()
        dist.destroy_process_group()


def abort_group() -> None:
    """Let what waits for other ranks in this process's group end, on a GPU; from any thread."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()
