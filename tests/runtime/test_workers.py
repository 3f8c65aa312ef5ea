"""Large work never keeps small work waiting."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest

from slipstream.runtime.workers import LARGE, Workers


def test_small_work_is_done_while_large_work_takes_turns() -> None:
    release, running = threading.Event(), []

    def large(name: int) -> int:
        running.append(name)
        assert release.wait(60)
        return name

    async def run() -> None:
        workers = Workers()
        works = [asyncio.create_task(workers.run(LARGE + 1, large, i)) for i in range(40)]
        for i in range(100):
            assert await workers.run(1, abs, -i) == i
        assert len(running) <= 1, "two at a time take the memory of two"
        release.set()
        assert await asyncio.gather(*works) == list(range(40))
        workers.shutdown()
        with pytest.raises(RuntimeError):
            await workers.run(1, abs, 1)

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_large_work_leaves_the_cores_to_steps() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def run() -> None:
        workers = Workers()
        assert await workers.run(1, niceness) == niceness()
        assert await workers.run(LARGE + 1, niceness) > niceness()
        workers.shutdown()

    asyncio.run(run())
