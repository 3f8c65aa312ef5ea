"""An engine that hands prompts over, and what asks it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.handover.exchange import Exchange
from slipstream.runtime.handover.files import FileTransport
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.sampling.params import SamplingParams


@dataclass
class Worker:
    llm: AsyncLLM
    exchange: Exchange
    directory: Path

    @property
    def files(self) -> list[str]:
        return os.listdir(next(self.directory.iterdir()))

    async def prefill(self, prompt: list[int], salt: str = "") -> Mapping[str, Any]:
        async with self.exchange.sending(prompt, salt) as sending:
            await self.answer(prompt, 1, salt, sending.handover)
            return await sending.send()

    async def decode(
        self, told: object, prompt: list[int], salt: str = "", count: int = 5
    ) -> list[int]:
        async with self.exchange.receiving(told, prompt, salt) as handover:
            return await self.answer(prompt, count, salt, handover)

    async def answer(self, prompt: list[int], count: int, salt: str, handover: Any) -> list[int]:  # noqa: ANN401
        tokens: list[int] = []
        params = SamplingParams(temperature=0, max_tokens=count)
        made = self.llm.generate(
            prompt, params, output_kind="delta", cache_salt=salt, handover=handover
        )
        async for output in made:
            tokens += output.outputs[0].token_ids
        return tokens

    async def rest(self) -> None:
        """Return when all slots are free."""
        pool = self.exchange._pool
        while pool.num_free < pool.num_slots:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def worker_on(
    engine: LoadedEngine, directory: Path, fingerprint: str | None = None, timeout: float = 60
) -> AsyncIterator[Worker]:
    """One whose files are in a directory."""
    llm = AsyncLLM.from_engine(engine)
    assert llm.staging is not None
    transport = FileTransport(directory, llm.staging, timeout)
    exchange = Exchange(llm.staging, transport, fingerprint or llm.fingerprint, timeout)
    try:
        yield Worker(llm, exchange, directory)
    finally:
        await exchange.close()
        await asyncio.to_thread(llm.shutdown)
