"""Ranks that run the GPU's kernels in Triton's interpreter, a process each.

    TRITON_INTERPRET=1 python -m tests.plugins.collectives.cuda_ranks RANKS

Each makes x of every rank from the number of a call,
and compares what it gets with the reference, bit for bit where no norm is taken.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from tests.plugins.interpreter import repair

from slipstream.plugins.collectives import reference
from slipstream.plugins.collectives.cuda.exchange import (
    PROGRAMS,
    Norm,
    Room,
    Way,
    fits,
    gather,
    reduce,
    reducible,
)
from slipstream.plugins.collectives.cuda.layout import Layout
from slipstream.plugins.rms_norm.reference import fused_add_rms_norm

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL, LARGE = 32 << 10, 128 << 10
# One row, several programs of several rows of which no rank has its share, one number, odd ones.
SHAPES = [(1, 256, BF16), (9, 64, F16), (3, 7, BF16), (4, 33, F32), (2, 2048, BF16)]
EPSILON = 1e-5


def made(call: int, ranks: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x of every rank, a residual and a weight, in one call of all."""
    generator = torch.Generator().manual_seed(call)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(ranks + 2)]


def check(room: Room, call: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """One call each of the kernels that take such x."""
    ranks = room.layout.ranks
    *x, residual, weights = made(call, ranks, rows, width, dtype)
    own, weight = x[room.rank], weights[0].contiguous()
    total = torch.from_numpy(reference.all_reduce([each.float().numpy() for each in x])).to(dtype)
    norm = Norm(residual, weight, EPSILON)
    for way in Way:
        assert fits(way, room, own, norm)
        y, nothing = reduce(way, room, own)
        assert nothing is None and y.dtype == dtype and torch.equal(y, total), way
        if reducible(own, norm):
            y, both = reduce(way, room, own, norm)
            assert both is not None and torch.equal(both, total + residual), way
            wanted, _ = fused_add_rms_norm(
                total.float().numpy(), residual.float().numpy(), weight.float().numpy(), EPSILON
            )
            np.testing.assert_allclose(y.float().numpy(), wanted, rtol=0.02, atol=0.02)
        if way is not Way.PARTS and width * dtype.itemsize % 4 == 0:
            wide = own.new_empty(rows, ranks * width)
            gather(way, room, own, wide)
            assert torch.equal(wide, torch.cat(x, dim=1))


def give_way() -> None:
    """Who looks whether others have come lets them run: there are more ranks than cores."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("create_masked_load", "create_atomic_rmw"):
        looks = getattr(InterpreterBuilder, name)

        def patient(self: Any, *args: Any, looks: Any = looks) -> Any:  # noqa: ANN401
            time.sleep(1e-4)
            return looks(self, *args)

        setattr(InterpreterBuilder, name, patient)


def run(memory: torch.Tensor, rank: int, layout: Layout) -> None:
    """Make every call with the other ranks, as one of them."""
    addresses = [memory.data_ptr() + each * layout.bytes for each in range(layout.ranks)]
    turns = torch.full((PROGRAMS,), -4, dtype=torch.int32)  # soon to begin again
    room = Room(rank, layout, torch.tensor(addresses), turns, programs=3)
    for call, (rows, width, dtype) in enumerate(SHAPES):
        check(room, call, rows, width, dtype)
        sys.stdout.write(f"rank {rank}: {rows} {width} {dtype}\n")
    sys.stdout.flush()


def main() -> int:
    """Become several ranks, which share what is imported and memory; how many of them failed."""
    ranks = int(sys.argv[1])
    repair()
    give_way()
    layout = Layout(ranks, SMALL, LARGE, PROGRAMS)
    memory = torch.zeros(ranks * layout.bytes, dtype=torch.uint8).share_memory_()
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(memory, rank, layout)) for rank in range(ranks)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):  # the others would wait for ever
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return sum(process.exitcode != 0 for process in processes)


if __name__ == "__main__":
    sys.exit(main())
