"""Work on large arrays by all cores: NumPy lets go of the interpreter while it computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from slipstream.cores import usable_cores

_Part = TypeVar("_Part")


def in_parallel(
    work: Callable[[_Part], object], parts: Iterable[_Part], threads: int | None = None
) -> None:
    """Call ``work`` with every part, on as many threads as there are cores, or ``threads`` if that
    is less; one of them is the caller's, so that parts may do the same with parts of their own.

    All calls have ended when this returns, or raises what the first of them raised.
    """
    waiting = list(parts)
    shared = iter(waiting)

    def drain() -> None:
        for part in shared:
            work(part)

    helpers = min(_cores(), len(waiting), threads or len(waiting)) - 1
    started = [_pool().submit(drain) for _ in range(helpers)]
    try:
        drain()
    except BaseException:
        list(shared)  # the others find nothing more to do
        raise
    finally:
        running = [helper for helper in started if not helper.cancel()]
        errors = [helper.exception() for helper in running]
    for error in errors:
        if error is not None:
            raise error


def row_chunks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """The rows of a matrix in parts of about so many elements."""
    step = max(1, elements // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@cache
def _cores() -> int:
    return usable_cores()  # which reads files: too dear for every call


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), "slipstream-weights")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent
