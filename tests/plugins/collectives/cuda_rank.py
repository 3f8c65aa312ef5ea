"""One rank of several that run the GPU's kernels in Triton's interpreter, a process each.

    TRITON_INTERPRET=1 python -m tests.plugins.collectives.cuda_rank MEMORY RANK RANKS

Their memory is a file that all of them map. Each makes x of every rank from the number of a call,
and compares what it gets with the reference, bit for bit where no norm is taken.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from tests.plugins.interpreter import repair

from slipstream.plugins.collectives import reference
from slipstream.plugins.collectives.cuda.exchange import (
    PROGRAMS,
    Norm,
    Room,
    fits_one_shot,
    fits_two_shots,
    gather,
    reduce_at_once,
    reduce_in_parts,
    reducible,
)
from slipstream.plugins.collectives.cuda.layout import Layout
from slipstream.plugins.rms_norm.reference import fused_add_rms_norm

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL, LARGE = 32 << 10, 128 << 10
# Several programs of several rows, rows that no rank has its share of, one number, odd ones.
SHAPES = [
    (1, 256, BF16), (5, 96, F16), (1, 1, BF16), (3, 7, F16), (130, 64, BF16), (4, 33, F32),
    (2, 4096, BF16), (1, 256, BF16), (9, 40, F32),
]  # fmt: skip
EPSILON = 1e-5


def layout_of(ranks: int) -> Layout:
    """That of the memory of all ranks in the tests."""
    return Layout(ranks, SMALL, LARGE, PROGRAMS)


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
    for reduce, fits in (
        (reduce_at_once, fits_one_shot(room, own)),
        (reduce_in_parts, fits_two_shots(room, own, None)),
    ):
        assert fits
        y, nothing = reduce(room, own)
        assert nothing is None and y.dtype == dtype and torch.equal(y, total), reduce
        if reducible(own, norm):
            y, both = reduce(room, own, norm)
            assert both is not None and torch.equal(both, total + residual), reduce
            wanted, _ = fused_add_rms_norm(
                total.float().numpy(), residual.float().numpy(), weight.float().numpy(), EPSILON
            )
            np.testing.assert_allclose(y.float().numpy(), wanted, rtol=0.02, atol=0.02)
    if width * dtype.itemsize % 4 == 0:
        wide = own.new_empty(rows, ranks * width)
        gather(room, own, wide)
        assert torch.equal(wide, torch.cat(x, dim=1))


def main() -> None:
    """Join the ranks and make every call with them."""
    memory, (rank, ranks) = sys.argv[1], map(int, sys.argv[2:])
    repair()
    layout = layout_of(ranks)
    shared = torch.from_file(memory, shared=True, size=ranks * layout.bytes, dtype=torch.uint8)
    addresses = [shared.data_ptr() + each * layout.bytes for each in range(ranks)]
    room = Room(rank, layout, torch.tensor(addresses), torch.zeros(PROGRAMS, dtype=torch.int32))
    for call, (rows, width, dtype) in enumerate(SHAPES):
        check(room, call, rows, width, dtype)
        sys.stdout.write(f"{rank}: {rows} {width} {dtype}\n")


if __name__ == "__main__":
    main()
