"""Ranks that run the GPU's kernels, a process each: on GPUs, or in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.plugins.collectives.cuda_ranks RANKS

Each makes x of every rank from the number of a call, and compares what it gets with the reference,
bit for bit where no norm is taken. On GPUs it then replays captured calls.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tests.plugins.interpreter import repair

from slipstream.plugins.collectives import reference
from slipstream.plugins.collectives.cuda.communicator import Communicator
from slipstream.plugins.collectives.cuda.copies import Copies, Pieces
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
from slipstream.plugins.collectives.cuda.multicast import leave_multicast_off
from slipstream.plugins.collectives.cuda.shared_memory import SharedMemory
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.rms_norm.reference import fused_add_rms_norm

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL, LARGE = 32 << 10, 128 << 10
# One row, several programs of several rows of which no rank has its share, one number, odd ones,
# and so many rows that a program sends several at a time.
SHAPES = [(1, 256, BF16), (9, 64, F16), (3, 7, BF16), (4, 33, F32), (2, 2048, BF16)]
SHAPES += [(140, 16, F16)]
# Those that go in pieces of four rows, the last of them not whole, up to as many as there may be.
COPIED = [(12, 512, BF16), (9, 1024, F16), (31, 512, BF16)]
PIECES = Pieces(least=8 << 10, size=4 << 10, rows=4)
EPSILON = 1e-5
REPLAYS = 300


def made(call: int, ranks: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x of every rank, a residual and a weight, in one call of all."""
    generator = torch.Generator().manual_seed(call)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(ranks + 2)]


def check(room: Room, call: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """One call each of the kernels that take such x."""
    ranks = room.layout.ranks
    everything = made(call, ranks, rows, width, dtype)
    *x, residual, weights = (each.to(room.peers.device) for each in everything)
    own, weight = x[room.rank], weights[0].contiguous()
    total = torch.from_numpy(reference.all_reduce([numpy(each) for each in x])).to(x[0])
    norm, normed = Norm(residual, weight, EPSILON), None
    for way in Way:
        assert rows <= rows_that_fit(way, room, width * dtype.itemsize)
        y, nothing = reduce(way, room, own)
        assert nothing is None and y.dtype == dtype and torch.equal(y, total), way
        if reducible(own, norm):
            y, both = reduce(way, room, own, norm)
            assert both is not None and torch.equal(both, total + residual), way
            wanted, _ = fused_add_rms_norm(numpy(total), numpy(residual), numpy(weight), EPSILON)
            np.testing.assert_allclose(numpy(y), wanted, rtol=0.02, atol=0.02)
            assert normed is None or torch.equal(y, normed), "which way it came says nothing"
            normed = y
        if way is not Way.PARTS and width * dtype.itemsize % 4 == 0:
            wide = own.new_empty(rows, ranks * width)
            gather(way, room, own, wide)
            assert torch.equal(wide, torch.cat(x, dim=1))


def check_in_parts(room: Room) -> None:
    """What there is no room for at once goes in parts, and is the same."""
    ranks, device = room.layout.ranks, room.peers.device
    *x, residual, weights = (each.to(device) for each in made(99, ranks, 11, 2048, BF16))
    own, total = x[room.rank], torch.from_numpy(reference.all_reduce([numpy(each) for each in x]))
    assert len(own) > rows_that_fit(Way.LINES, room, 2 * 2048)
    communicator = Communicator.__new__(Communicator)
    communicator.size, communicator._room = ranks, room
    assert torch.equal(communicator.all_reduce(own), total.to(own))
    y, both = communicator.all_reduce_add_norm(own, residual, weights[0], EPSILON)
    assert torch.equal(both, total.to(own) + residual)
    wanted, _ = fused_add_rms_norm(numpy(total), numpy(residual), numpy(weights[0]), EPSILON)
    np.testing.assert_allclose(numpy(y), wanted, rtol=0.02, atol=0.02)
    assert torch.equal(communicator.all_gather(own), torch.cat(x, dim=1))


def check_copies(copies: Copies) -> None:
    """What is sent while it is filled is added up as any other x, to the bit; again and again,
    among sums that go other ways."""
    room = copies._room
    ranks, device = room.layout.ranks, room.peers.device
    for call, (rows, width, dtype) in enumerate(COPIED * 2):
        *x, residual, weights = (e.to(device) for e in made(call + 200, ranks, rows, width, dtype))
        own, norm = x[room.rank], Norm(residual, weights[0], EPSILON)
        for each in (None, norm):
            sending = copies.begin(rows, width, dtype)
            assert sending is not None and len(sending.parts) > 1
            for part in sending.filling():
                sending.x[part] = own[part]
            y, total = copies.reduce(sending, each)
            wanted, both = reduce(Way.WORDS, room, own, each)
            assert torch.equal(y, wanted)
            assert (total is None) == (both is None) == (each is None)
            if total is not None and both is not None:
                assert torch.equal(total, both)
    for rows, width, dtype in ((3, 512, BF16), (12, 512, F32), (12, 7, BF16), (4096, 512, F16)):
        assert copies.begin(rows, width, dtype) is None


def numpy(x: torch.Tensor) -> NDArray[np.float32]:
    """Its values on the host."""
    values: NDArray[np.float32] = x.float().cpu().numpy()
    return values


def replay(room: Room) -> None:
    """Captured calls of all ways and some sizes, replayed in an order of chance, over x that
    differs each time; nothing of an earlier replay is left for who reads too soon."""
    device, ranks = room.peers.device, room.layout.ranks
    step = torch.zeros((), dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    graphs, stream = list[torch.cuda.CUDAGraph](), torch.cuda.Stream(device)

    def call(way: Way, rows: int, width: int, pdl: bool) -> None:
        index = torch.arange(rows * width, device=device).view(rows, width)
        x = [((index * 7 + step * 13 + rank * 5) % 17 - 8).to(BF16) for rank in range(ranks)]
        norm = Norm(x[0], torch.ones(width, dtype=BF16, device=device), EPSILON)
        for _ in range(3):
            (y, _), (_, both) = (reduce(way, room, x[room.rank], n, pdl=pdl) for n in (None, norm))
            assert both is not None
            wrong.add_((y != sum(x)).sum() + (both != sum(x) + x[0]).sum())
            y.fill_(torch.nan)
            both.fill_(torch.nan)
        step.add_(1)

    with torch.cuda.stream(stream):
        for way in Way:
            for rows, width, pdl in ((1, 256, False), (2, 2048, False), (16, 256, True)):
                call(way, rows, width, pdl)
                torch.cuda.synchronize()
                graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graphs[-1], stream=stream):
                    call(way, rows, width, pdl)
        order = np.random.default_rng(0)
        for which in order.integers(len(graphs), size=REPLAYS):
            graphs[which].replay()
    torch.cuda.synchronize()
    assert int(step) == REPLAYS + len(graphs) and int(wrong) == 0


def give_way() -> None:
    """Who looks whether others have come lets them run: there are more ranks than cores."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("create_masked_load", "create_atomic_rmw"):
        looks = getattr(InterpreterBuilder, name)

        def patient(self: Any, *args: Any, looks: Any = looks) -> Any:  # noqa: ANN401
            time.sleep(1e-4)
            return looks(self, *args)

        setattr(InterpreterBuilder, name, patient)


def run(rank: int, room: Room, memories: list[torch.Tensor]) -> None:
    """Make every call with the other ranks, as one of them."""
    for call, (rows, width, dtype) in enumerate(SHAPES):
        check(room, call, rows, width, dtype)
        sys.stdout.write(f"rank {rank}: {rows} {width} {dtype}\n")
    check_in_parts(room)
    more = replace(room, programs=room.programs + 3)  # of which it leaves some alone
    copies = Copies(more, memories, PIECES)
    copies._turn = (1 << 31) - 4  # soon to begin again
    check_copies(copies)
    sys.stdout.flush()


def interpreted(rank: int, layout: Layout, memory: torch.Tensor) -> None:
    """A rank of those that are forked and have a piece of ``memory`` each."""
    addresses = [memory.data_ptr() + each * layout.bytes for each in range(layout.ranks)]
    turns = torch.full((PROGRAMS,), -4, dtype=torch.int32)  # soon to begin again
    room = Room(rank, layout, torch.tensor(addresses), turns, programs=3)
    run(rank, room, list(memory.view(layout.ranks, layout.bytes)))


def native(rank: int, layout: Layout, meeting: str) -> None:
    """A rank of those that meet at a file and have a GPU each."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    leave_multicast_off()
    store = dist.FileStore(meeting, layout.ranks)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=rank, world_size=layout.ranks)
    assert dist.group.WORLD is not None
    memory = SharedMemory(rank, layout.bytes, device, dist.group.WORLD)
    turns = torch.full((PROGRAMS,), -4, dtype=torch.int32, device=device)
    room = Room(rank, layout, memory.addresses, turns, programs=8)
    run(rank, room, memory.views)
    replay(room)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Become several ranks; how many of them failed."""
    ranks = int(sys.argv[1])
    layout = Layout(ranks, SMALL, LARGE, PROGRAMS, MEETINGS, SMALL)
    processes: list[BaseProcess]
    if interpreting():
        repair()
        give_way()
        torch.set_num_threads(1)  # others are not forked with the process
        memory = torch.zeros(ranks * layout.bytes, dtype=torch.uint8).share_memory_()
        processes = [
            multiprocessing.get_context("fork").Process(
                target=interpreted, args=(rank, layout, memory)
            )
            for rank in range(ranks)
        ]
    else:
        meeting = str(Path(tempfile.mkdtemp()) / "meeting")
        processes = [
            multiprocessing.get_context("spawn").Process(
                target=native, args=(rank, layout, meeting)
            )
            for rank in range(ranks)
        ]
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
