from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.errors import ExecutionError, InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.llm import LLM
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.testing import counting_engine

TEXTS = ["the quick brown fox", "jumps", "over the lazy dog " * 9]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pooling") / "engine"
    build(tiny_checkpoint, path, BuildOptions(target="cpu", task="embed"))
    return path


def serve(engine: Path, body: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """Run a body; afterwards no request may be left."""

    async def main() -> None:
        async with AsyncLLM(engine) as llm:
            await asyncio.wait_for(body(llm), timeout=120)
            while llm.stats.num_running or llm.stats.num_waiting or llm._streams:
                await asyncio.sleep(0.001)

    asyncio.run(main())


def test_it_gives_what_llm_gives(engine: Path) -> None:
    with LLM(engine) as llm:
        vectors, scores = llm.embed(TEXTS), llm.score(TEXTS[0], TEXTS)

    async def body(llm: AsyncLLM) -> None:
        one, several, found = await asyncio.gather(
            llm.embed(TEXTS[0]), llm.embed(TEXTS), llm.score(TEXTS[0], TEXTS)
        )
        np.testing.assert_allclose(one, vectors[:1], atol=1e-5)
        np.testing.assert_allclose(several, vectors, atol=1e-5)
        assert found == pytest.approx(scores, abs=1e-5)
        outputs = [output async for output in llm.pool(TEXTS[1], PoolingParams(dimensions=3))]
        assert [output.finished for output in outputs] == [True]
        assert outputs[0].pooled is not None and outputs[0].pooled.shape == (3,)
        assert outputs[0].outputs[0].token_ids == [] and outputs[0].outputs[0].text == ""

    serve(engine, body)


def test_a_prompt_that_is_refused_ends_the_others(engine: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        with pytest.raises(InvalidRequestError, match="the vocabulary has 0 to 319"):
            await llm.embed([[1] * 500, [999], [2] * 500])
        with pytest.raises(InvalidRequestError, match="has no logits"):
            await anext(llm.generate("a"))

    serve(engine, body)


def test_who_is_cancelled_leaves_nothing_behind(engine: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        asked = asyncio.create_task(llm.embed([[n] * 400 for n in range(200)]))
        while not llm.stats.num_running:
            await asyncio.sleep(0.001)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    serve(engine, body)


def test_an_engine_that_generates_refuses_and_a_closed_one_too() -> None:
    async def main() -> None:
        llm = AsyncLLM.from_engine(counting_engine())
        for ask in (lambda: llm.embed("a"), lambda: llm.score("a", "b")):
            with pytest.raises(InvalidRequestError, match="--task embed"):
                await ask()
        llm.shutdown()
        with pytest.raises(ExecutionError, match="shut down"):
            await anext(llm.pool("a"))

    asyncio.run(main())
