"""A crafted tokenizer makes the Rust library panic, and what that raises is no ``Exception``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from tests.runtime.engine.driving import drain, greedy
from tokenizers import decoders

from slipstream.errors import ExecutionError, InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import OutputKind, Request, RequestOutput
from slipstream.runtime.testing import ALPHABET, counting_engine
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings
from slipstream.server.core.merge import merge

A, W, X = (ALPHABET.index(letter) for letter in "awx")
PANIC = "the tokenizer gave up on"


class Panicking:
    """A backend that panics on encoding a text of a single x."""

    def __init__(self, backend: Any) -> None:  # noqa: ANN401
        self._backend = backend

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:  # noqa: ANN401
        decoders.Strip("x", 0, 9).decode(texts)
        return self._backend.encode_batch_fast(texts, **options)


def crafted_engine() -> LoadedEngine:
    """The counting model, in whose tokenizer an x panics, coming or going."""
    backend = counting_engine().tokenizer._backend
    backend.decoder = decoders.Strip("x", 0, 9)
    tokenizer = Tokenizer(Panicking(backend), TokenizerSettings())  # type: ignore[arg-type]
    return replace(counting_engine(), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
@pytest.mark.parametrize("stop", [(), ("?",)])
@pytest.mark.parametrize("n", [1, 2])
def test_a_text_that_cannot_be_decoded_ends_its_request_alone(
    kind: OutputKind, stop: tuple[str, ...], n: int
) -> None:
    loop = EngineLoop(crafted_engine())
    params = greedy(max_tokens=9, stop=list(stop), n=n)
    loop.add_request(Request("bad", [W - 2], params, output_kind=kind))
    loop.add_request(Request("good", [A], greedy(max_tokens=9)))
    outputs = drain(loop)
    bad = outputs["bad"]
    assert bad.finished and isinstance(bad.error, ExecutionError) and PANIC in str(bad.error)
    assert outputs["good"].error is None and outputs["good"].outputs[0].text == "bcdefghij"
    assert loop.unhealthy is None


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


def test_panics_reach_only_the_requests_that_they_belong_to() -> None:
    async def main() -> None:
        async with AsyncLLM.from_engine(crafted_engine()) as llm:
            good = asyncio.create_task(last(llm.generate("a", greedy(max_tokens=20))))
            with pytest.raises(InvalidRequestError, match=PANIC):
                await last(llm.generate("x", greedy()))
            with pytest.raises(ExecutionError, match=PANIC):  # what the text follows
                await last(llm.generate([X], greedy()))
            with pytest.raises(ExecutionError, match=PANIC):
                await last(llm.generate("v", greedy()))
            assert len((await good).outputs[0].text) == 20
            assert llm.check_health() and llm.closed is None

    asyncio.run(main())


def test_a_panic_in_one_of_several_prompts_is_raised() -> None:
    async def panics() -> AsyncGenerator[int, None]:
        await asyncio.sleep(0)
        decoders.Strip("x", 0, 9).decode(["x"])
        yield 1

    async def waits() -> AsyncGenerator[int, None]:
        await asyncio.Event().wait()
        yield 2

    async def main() -> None:
        with pytest.raises(BaseException, match="index out of bounds"):
            async for _ in merge([panics(), waits()]):
                pass

    asyncio.run(asyncio.wait_for(main(), 60))
