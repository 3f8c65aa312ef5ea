"""The C++ kernels of AllReduce and AllGather, by ranks that are threads, against NumPy."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slipstream.plugins import library, native
from slipstream.plugins.collectives import GATHER_SPEC, SPEC, reference
from slipstream.plugins.collectives.native import join, leave, memory_size, turns
from slipstream.plugins.spec import OperatorSpec

Matrix = NDArray[np.float32]
SLOT = 4096 * 4 + 4  # a whole block of floats, and one more


def by_ranks(ranks: int, work: Callable[[int], Any], memory: mmap.mmap) -> list[Any]:
    """What ``work`` gives each rank, which has joined the others."""

    def run(rank: int) -> Any:  # noqa: ANN401
        join(memory, rank, ranks)
        try:
            return work(rank)
        finally:
            leave()

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def _called(spec: OperatorSpec, x: Matrix, isa: str, rank: int) -> Matrix:
    (y,) = native.call(spec, {"x": x[rank], "ranks": len(x)}, isa, 2)
    return y


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [(SPEC, reference.all_reduce), (GATHER_SPEC, reference.all_gather)],
    ids=["reduce", "gather"],
)
def test_matches_reference(
    spec: OperatorSpec, expected: Callable[..., Matrix], ranks: int, isa: str
) -> None:
    """Bit for bit: less than a slot, ends of rows in the midst of one, and many of them."""
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 64), (1, 4097), (7, 3001), (40, 700)):
        x = rng.normal(0, 3, (ranks, *shape)).astype(np.float32)
        with mmap.mmap(-1, memory_size(ranks, SLOT)) as memory:
            made = by_ranks(ranks, partial(_called, spec, x, isa), memory)
        for y in made:
            np.testing.assert_array_equal(y, expected(x))


def test_ranks_meet_again_and_again() -> None:
    """Slots are used in turns; a rank that is late still finds what the others wrote."""
    ranks, rounds, isa = 3, 300, library.isas()[0]

    def work(rank: int) -> list[float]:
        sums = []
        for turn in range(rounds):
            x = np.full((1, 5), rank + turn, np.float32)
            sums.append(float(native.call(SPEC, {"x": x, "ranks": ranks}, isa)[0][0, 0]))
        return sums

    with mmap.mmap(-1, memory_size(ranks, 64)) as memory:
        for sums in by_ranks(ranks, work, memory):
            assert sums == [3 + 3 * turn for turn in range(rounds)]
        assert turns(memory, ranks) == [rounds] * ranks
