"""Several async generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")


class _Box(Generic[T]):
    """An item, or how a generator ended."""

    __slots__ = ("error", "item")

    def __init__(self, item: T | None = None, error: BaseException | None = None) -> None:
        self.item = item
        self.error = error


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all, as they come; the first error closes all and is raised.

    Every generator runs in a task of its own, and none is left running.
    """
    queue: asyncio.Queue[_Box[T]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(generator, queue)) for generator in generators]
    unfinished = len(tasks)
    try:
        while unfinished:
            box = await queue.get()
            if box.error is not None:
                raise box.error
            if box.item is None:
                unfinished -= 1
            else:
                yield box.item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(generator: AsyncGenerator[T, None], queue: asyncio.Queue[_Box[T]]) -> None:
    try:
        async with aclosing(generator):
            async for item in generator:
                queue.put_nowait(_Box(item))
        queue.put_nowait(_Box())
    except asyncio.CancelledError as error:
        queue.put_nowait(_Box(error=error))
        raise
    except BaseException as error:  # noqa: BLE001 - it is raised where the items are read
        queue.put_nowait(_Box(error=error))
