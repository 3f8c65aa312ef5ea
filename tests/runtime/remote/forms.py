"""The two forms of an engine for asyncio: in this process, and at the other end of a link."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.remote.client import RemoteLLM
from slipstream.runtime.remote.host import EngineHost
from slipstream.runtime.remote.link import Link


async def connected(host: EngineHost, index: int = 0) -> RemoteLLM:
    """An asker of a host in this process; all that it is told goes through a socket."""
    here, there = socket.socketpair()

    async def stats(_: object) -> EngineStats:
        return host.stats

    link = await Link.over(there, {"stats": stats})
    client = host.connect(index, link)
    link.listen(client.received, client.lost)
    own = await Link.over(here, {})
    llm = RemoteLLM(host.model, own)
    own.listen(llm.received, llm.lost)
    return llm


@asynccontextmanager
async def hosted(engine: LoadedEngine) -> AsyncIterator[tuple[EngineHost, RemoteLLM]]:
    """An engine and one who asks it; at the end none of its pages is in use, unless it is
    broken."""
    host = EngineHost(engine)
    llm = await connected(host)
    try:
        yield host, llm
        if host.thread.unhealthy is None:
            await until_idle(host)
    finally:
        llm.shutdown()
        for client in host.clients.values():
            client.link.close()
        await asyncio.to_thread(host.shutdown)


@asynccontextmanager
async def local(engine: LoadedEngine) -> AsyncIterator[AsyncLLM]:
    """The same in one."""
    async with AsyncLLM.from_engine(engine) as llm:
        yield llm


async def until_idle(host: EngineHost) -> None:
    """Wait until no request and no page is left."""
    deadline = time.monotonic() + 60
    while True:
        stats = host.stats
        if (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0):
            return
        assert time.monotonic() < deadline, f"requests were left behind: {stats}"
        await asyncio.sleep(0.001)
