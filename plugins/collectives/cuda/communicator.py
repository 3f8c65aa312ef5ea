"""What the ranks of one engine exchange on their GPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.plugins.rms_norm.cuda import rms_norm

# By its newer name, where the older one warns.
_gather_all = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Communicator:
    """Sums and columns of all ranks, for one rank; every rank makes the same calls in one order.

    Rank ``rank`` of ``size`` on ``device``. ``group`` is the process group of exactly these ranks,
    in this order: NCCL's on GPUs. Making one is a collective call of all ranks, and no stream may
    be capturing. Call ``leave_multicast_off`` (``multicast.py``) before the group is made.

    What is exchanged through symmetric memory is at most ``max_bytes``, those of x of one rank;
    larger x go through the group. Calls wait for nothing on the host, so they can be captured in
    CUDA graphs, and graphs may be replayed in any order, the same on every rank. All calls must be
    on one stream, or on streams that wait for each other. Results are the same bits on all ranks.

    On a device without symmetric memory everything goes through the group.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        max_bytes: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.rank, self.size, self.device, self.max_bytes = rank, size, device, max_bytes
        self._group = group

    def all_reduce(self, x: Tensor, *, pdl: bool = False) -> Tensor:
        """The sum of x ``[rows, width]`` (bfloat16, float16 or float32) of all ranks, added up in
        float32 in the order of the ranks and rounded once to the dtype of x; x stays as it is."""
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self._group)
        return total

    def all_reduce_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, pdl: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The RMS norm of ``total`` times ``weight [width]``, and ``total``, which is
        ``all_reduce(x) + residual``, both ``[rows, width]``: rounded to the dtype of x, bfloat16 or
        float16, after each of the three as where they are computed apart."""
        both = rms_norm(self.all_reduce(x, pdl=pdl), weight, epsilon, residual=residual, pdl=pdl)
        assert isinstance(both, tuple)
        return both

    def all_gather(self, x: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
        """The columns of x ``[rows, width]`` (any dtype) of all ranks, side by side in their order:
        ``[rows, size * width]``, in ``out`` if given."""
        parts = x.new_empty((self.size * len(x), x.shape[1]))
        _gather_all(parts, x.contiguous(), group=self._group)
        wide = parts.view(self.size, *x.shape).transpose(0, 1).reshape(len(x), -1)
        return wide if out is None else out.copy_(wide)

    def close(self) -> None:
        """Give the memory back, when no call is on its way on any rank. The group stays open."""
