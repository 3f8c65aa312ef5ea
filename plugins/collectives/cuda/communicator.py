"""What the ranks of one engine exchange on their GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.plugins.collectives.cuda.copies import Copies, Sending
from slipstream.plugins.collectives.cuda.exchange import (
    MEETINGS,
    PROGRAMS,
    Norm,
    Room,
    Way,
    gather,
    reduce,
    reducible,
    rows_that_fit,
)
from slipstream.plugins.collectives.cuda.layout import Layout
from slipstream.plugins.collectives.cuda.shared_memory import SharedMemory
from slipstream.plugins.rms_norm.cuda import rms_norm

# The largest x, in bytes, that goes as lines, and as words; by the number of ranks. Of two it is
# measured on H200s, of more computed from what those took: each other rank adds to what is sent.
LINES_BYTES = {2: 512 << 10, 4: 128 << 10, 8: 64 << 10}
# Of two ranks words are no more bytes than parts, however many.
WORDS_BYTES = {2: 1 << 62, 4: 512 << 10, 8: 128 << 10}
# The largest x, in bytes, that is sent while it is computed. More ranks have more to send and less
# to compute: nobody has seen whether the one hides the other.
COPIED_BYTES = {2: 64 << 20, 4: 0, 8: 0}
# Newer versions of torch have it under this name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator:
    """Sums and columns of all ranks, for one rank; every rank makes the same calls in one order.

    Rank ``rank`` of ``size`` on ``device``. ``group`` is the process group of exactly these ranks,
    in this order: NCCL's on GPUs. Making one is a collective call of all ranks, and no stream may
    be capturing. Call ``leave_multicast_off`` (``multicast.py``) before the group is made.

    What is exchanged through symmetric memory at once is at most ``max_bytes``, those of x of one
    rank; larger x go in several parts. What no kernel of ours takes goes through the group. Calls
    wait for nothing on the host, so they can be captured in CUDA graphs, and graphs may be replayed
    in any order, the same on every rank. All calls must be on one stream, or on streams that wait
    for each other. Results are the same bits on all ranks.

    On a CPU everything goes through the group. On the device ``meta``, where kernels are recorded
    before there is a GPU (``plugins/cuda/precompile.py``), there is none.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        max_bytes: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.rank, self.size, self.device, self.max_bytes = rank, size, device, max_bytes
        self._group = group
        self._memory: SharedMemory | None = None
        self._room: Room | None = None
        self._copies: Copies | None = None
        copied = COPIED_BYTES[size]
        layout = Layout(size, LINES_BYTES[size], max_bytes, PROGRAMS, MEETINGS, copied)
        if device.type == "cuda":
            assert group is not None
            self._memory = SharedMemory(rank, layout.bytes, device, group)
            turns = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            programs = min(PROGRAMS, processors)
            self._room = Room(rank, layout, self._memory.addresses, turns, programs)
            self._copies = Copies(self._room, self._memory.views)
        elif device.type == "meta":
            addresses = torch.empty(size, dtype=torch.int64, device=device)
            turns = torch.empty(PROGRAMS, dtype=torch.int32, device=device)
            self._room = Room(rank, layout, addresses, turns)
            self._copies = Copies(self._room)

    def sending(self, rows: int, width: int, dtype: torch.dtype) -> Sending | None:
        """Room for an x that is to be added up, which goes to the others while it is filled; None
        for one that is computed first."""
        return None if self._copies is None else self._copies.begin(rows, width, dtype)

    def all_reduce(self, x: Tensor, *, sent: Sending | None = None, pdl: bool = False) -> Tensor:
        """The sum of x ``[rows, width]`` (bfloat16, float16 or float32) of all ranks, added up in
        float32 in the order of the ranks and rounded once to the dtype of x; x stays as it is.
        It may have been ``sent``, then by every rank."""
        summed = self._reduce(x, None, sent, pdl)
        return self._through_group(x) if summed is None else summed[0]

    def all_reduce_add_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        epsilon: float,
        *,
        sent: Sending | None = None,
        pdl: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The RMS norm of ``total`` times ``weight [width]``, and ``total``, which is
        ``all_reduce(x) + residual``, both ``[rows, width]``: rounded to the dtype of x, bfloat16 or
        float16, after each of the three as where they are computed apart."""
        summed = self._reduce(x, Norm(residual, weight, epsilon), sent, pdl)
        if summed is not None:
            y, total = summed
            assert total is not None
            return y, total
        whole = self.all_reduce(x, pdl=pdl)
        both = rms_norm(whole, weight, epsilon, residual=residual, pdl=pdl)
        assert isinstance(both, tuple)
        return both

    def all_gather(self, x: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
        """The columns of x ``[rows, width]`` (any dtype) of all ranks, side by side in their order:
        ``[rows, size * width]``, in ``out`` if given."""
        wide = x.new_empty(len(x), self.size * x.shape[1]) if out is None else out
        row = x.shape[1] * x.element_size()
        if self._room is not None and row % 4 == 0 and wide.is_contiguous():
            whole = x.contiguous()
            lines = len(x) <= rows_that_fit(Way.LINES, self._room, row)
            way = Way.LINES if lines else Way.WORDS
            for part in _parts(len(x), rows_that_fit(way, self._room, row)):
                gather(way, self._room, whole[part], wide[part], pdl=pdl)
            return wide
        parts = x.new_empty((self.size * len(x), x.shape[1]))
        if self._group is not None:
            _all_gather(parts, x.contiguous(), group=self._group)
        side_by_side = parts.view(self.size, *x.shape).transpose(0, 1)
        return wide.copy_(side_by_side.reshape(wide.shape))

    def abandon(self) -> None:
        """Let calls that wait for ranks which have ended end too; what they make, and all calls
        from now on, means nothing. From any thread."""
        if self._memory is not None:
            self._memory.abandon()
        if self.device.type == "cuda" and self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """Give the memory back, when no call is on its way on any rank. The group stays open."""
        self._room = self._memory = self._copies = None

    def _reduce(
        self, x: Tensor, norm: Norm | None, sent: Sending | None, pdl: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """By a kernel of ours; None for what is none's."""
        if sent is not None:
            return sent.copies.reduce(sent, norm)
        room, row = self._room, x.shape[1] * x.element_size()
        if room is None or not reducible(x, norm):
            return None
        way = self._way(x)
        most = rows_that_fit(way, room, row)
        if len(x) <= most:
            return reduce(way, room, x, norm, pdl=pdl)
        if not most or row % 4:
            return None
        whole, y = x.contiguous(), torch.empty_like(x)
        total = None if norm is None else torch.empty_like(x)
        for part in _parts(len(x), most):
            own = None if norm is None else replace(norm, residual=norm.residual[part])
            sums = None if total is None else total[part]
            reduce(way, room, whole[part], own, (y[part], sums), pdl=pdl)
        return y, total

    def _way(self, x: Tensor) -> Way:
        """The quickest for so many bytes."""
        size = x.numel() * x.element_size()
        if size <= LINES_BYTES[self.size]:
            return Way.LINES
        return Way.WORDS if size <= WORDS_BYTES[self.size] else Way.PARTS

    def _through_group(self, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total


def _parts(rows: int, most: int) -> Iterator[slice]:
    """So many rows in as few parts of one size as there is room for."""
    size = -(-rows // max(1, -(-rows // most)))
    for first in range(0, rows, max(size, 1)):
        yield slice(first, first + size)
