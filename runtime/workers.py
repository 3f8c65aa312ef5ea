"""Threads for work that an event loop must not wait for."""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Characters, or what takes about as long: some milliseconds.
LARGE = 1 << 16
_SMALL_THREADS = 4
_GRAMMAR_THREADS = 2
_NICENESS = 15  # of 19: a step's threads get a core that they want almost at once


class Workers:
    """Small pieces of work never wait behind large ones, which take turns in a thread of their own:
    together they take the time and the memory of one, and what a step leaves of the cores. Nothing
    waits behind grammars, of which one may take seconds."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(_SMALL_THREADS, "slipstream-small")
        self._large = ThreadPoolExecutor(1, "slipstream-large", initializer=_yield_to_others)
        self._grammars = ThreadPoolExecutor(_GRAMMAR_THREADS, "slipstream-grammar")

    async def run(
        self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The result of ``function``, whose work is as much as that of ``size`` characters."""
        return await self._run(self._large if size > LARGE else self._small, function, args, kwargs)

    async def compile(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``function``, which compiles a grammar."""
        return await self._run(self._grammars, function, args, kwargs)

    async def _run(
        self,
        pool: ThreadPoolExecutor,
        function: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> T:
        work = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def shutdown(self) -> None:
        """Take no more; what has begun comes to its end."""
        for pool in (self._small, self._large, self._grammars):
            pool.shutdown(wait=False, cancel_futures=True)


def _yield_to_others() -> None:
    """Lower the priority of the calling thread, which only Linux has for a thread by itself."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
