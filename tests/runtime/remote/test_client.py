"""What an engine of another process answers is what one of this process does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import pytest
from tests.runtime.remote.forms import connected, hosted, local, until_idle
from tests.server.devices import BrokenDevice, GatedDevice, PanickingDevice, engine_on

from slipstream.errors import ExecutionError, InvalidRequestError, SlipstreamError
from slipstream.runtime.engine.health import MAX_FAILURES
from slipstream.runtime.engine_client import EngineClient
from slipstream.runtime.remote.client import RemoteLLM
from slipstream.runtime.request import OutputKind, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import counting_engine

ASKED: list[tuple[str, dict[str, Any]]] = [
    ("abc", {}),
    ("abc", {"n": 3}),
    ("abc", {"logprobs": 2, "prompt_logprobs": 1}),
    ("a", {"stop": ["fgh"], "max_tokens": 30}),
    ("a", {"stop": ["fgh", "gh"], "max_tokens": 30, "include_stop_str_in_output": True}),
    ("a", {"stop": ["de"], "min_tokens": 9, "max_tokens": 12}),
    ("a", {"stop": ["de"], "n": 2, "logprobs": 1, "max_tokens": 9}),
    ("a", {"stop": ["g"], "max_tokens": 6}),  # on the last token of all
    ("a", {"stop_token_ids": [5], "max_tokens": 30}),
    ("a", {"stop_token_ids": [5], "include_stop_str_in_output": True, "max_tokens": 30}),
    ("9", {"max_tokens": 40}),  # to its end of sequence
    ("a", {"structured": StructuredOutput(regex="[a-z]{3}xyz[0-9]"), "max_tokens": 30}),
    ("a", {"structured": StructuredOutput(regex="b(cdefghijk)+"), "stop": ["hi"]}),
]


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, **params})


async def whole(llm: EngineClient, prompt: str, params: SamplingParams, kind: OutputKind) -> Any:  # noqa: ANN401
    """All that is told of a request; outputs of kind ``delta`` as one."""
    outputs = [o async for o in llm.generate(prompt, params, "id", output_kind=kind)]
    told = [[asdict(each) for each in output.outputs] for output in outputs]
    if kind == "delta":
        for later in told[1:]:
            for first, more in zip(told[0], later, strict=True):
                _join(first, more)
    last = outputs[-1]
    return (
        (told[0] if kind == "delta" else told[-1]),
        (last.prompt, last.prompt_token_ids, last.prompt_logprobs, last.num_cached_tokens),
        last.finished,
    )


def _join(first: dict[str, Any], more: dict[str, Any]) -> None:
    for name in ("text", "token_ids", "logprobs"):
        if more[name] is not None:
            first[name] += more[name]
    for name in ("finish_reason", "stop_reason", "cumulative_logprob"):
        first[name] = more[name]


@pytest.mark.parametrize("kind", ["delta", "final", "cumulative"])
def test_both_forms_answer_alike(kind: OutputKind) -> None:
    async def main() -> None:
        engine = {"enable_prefix_caching": False, "runs_ahead": True}
        async with local(counting_engine(**engine)) as llm:
            expected = [await whole(llm, text, greedy(**asked), kind) for text, asked in ASKED]
        async with hosted(counting_engine(**engine)) as (_, remote):
            for (text, asked), answer in zip(ASKED, expected, strict=True):
                assert await whole(remote, text, greedy(**asked), kind) == answer, (text, asked)

    asyncio.run(main())


def test_what_cannot_run_is_refused_alike() -> None:
    refused: list[tuple[Any, dict[str, Any]]] = [
        ("", {}),
        ([1000], {}),
        ("a" * 300, {}),
        ("a", {"stop_token_ids": [1000]}),
        ("a", {"structured": StructuredOutput(regex="(")}),
    ]

    async def error(llm: EngineClient, prompt: Any, asked: dict[str, Any]) -> SlipstreamError:  # noqa: ANN401
        with pytest.raises(SlipstreamError) as raised:
            [o async for o in llm.generate(prompt, greedy(**asked))]
        return raised.value

    async def main() -> None:
        async with local(counting_engine()) as llm, hosted(counting_engine()) as (_, remote):
            for prompt, asked in refused:
                here, there = [await error(each, prompt, asked) for each in (llm, remote)]
                assert type(here) is type(there)
                assert (str(here), here.param) == (str(there), there.param)
            outputs = [remote.generate("a", greedy(), "same") for _ in range(2)]
            await anext(outputs[0])
            with pytest.raises(InvalidRequestError, match="in use"):
                await anext(outputs[1])
            await outputs[0].aclose()

    asyncio.run(main())


async def begun(llm: EngineClient, max_tokens: int = 200) -> AsyncGenerator[RequestOutput, None]:
    """An endless stream that has had its first token."""
    endless = greedy(max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate("a", endless, output_kind="delta")
    assert (await anext(outputs)).outputs[0].text[:1] == "b"
    return outputs


def test_who_leaves_or_is_lost_leaves_no_pages_and_disturbs_nobody() -> None:
    async def main() -> None:
        engine = counting_engine(4096, delay=0.001, max_seq_len=10_000)
        async with hosted(engine) as (host, llm):
            await (await begun(llm)).aclose()
            await until_idle(host)
            other = await connected(host, 1)
            lost, stays = await begun(other, max_tokens=9_000), await begun(llm)
            other.shutdown()
            with pytest.raises(ExecutionError, match="process has ended"):
                [output async for output in lost]
            assert other.unhealthy and other.closed and llm.closed is None
            text = "".join([output.outputs[0].text async for output in stays])
            assert len(text) > 150
            await until_idle(host)

    asyncio.run(main())


def test_unread_tokens_are_told_at_once_and_a_stop_string_among_them_ends_the_request() -> None:
    async def main() -> None:
        with GatedDevice() as device:
            async with hosted(engine_on(device)) as (_, llm):
                device.permits.release()
                outputs = llm.generate("a", greedy(max_tokens=200, stop=["x"]), output_kind="delta")
                async with aclosing(outputs):
                    assert (await anext(outputs)).outputs[0].text == "b"
                    device.permits.release(40)  # beyond the stop string
                    while device.steps < 41:
                        await asyncio.sleep(0.001)
                    texts = [output.outputs[0].text async for output in outputs]
                assert "".join(texts) == "cdefghijklmnopqrstuvw" and len(texts) < 21
                device.permits.release(1000)

    asyncio.run(main())


def test_an_abort_is_an_ending() -> None:
    async def main() -> None:
        with GatedDevice() as device:
            async with hosted(engine_on(device)) as (_, llm):
                device.permits.release()
                outputs = llm.generate("a", greedy(max_tokens=200, ignore_eos=True), "mine")
                await anext(outputs)
                await llm.abort("mine")
                await llm.fetch_stats()  # what is asked later is answered later
                device.permits.release(1000)
                rest = [output async for output in outputs]
                assert rest[-1].outputs[0].finish_reason == "abort" and rest[-1].finished

    asyncio.run(main())


async def fails(outputs: AsyncIterator[RequestOutput], words: str) -> None:
    with pytest.raises(ExecutionError, match=words):
        [output async for output in outputs]


def test_an_engine_that_is_given_up_is_told() -> None:
    async def main() -> None:
        async with hosted(engine_on(BrokenDevice())) as (host, llm):
            for _ in range(MAX_FAILURES):
                await fails(llm.generate("a", greedy()), "told to fail")
            await closed(llm)
            assert llm.unhealthy == host.thread.unhealthy and not llm.check_health()
            await fails(llm.generate("a", greedy()), "steps in a row")
        async with hosted(engine_on(PanickingDevice())) as (host, llm):
            await fails(llm.generate("a", greedy()), "the engine loop stopped")
            assert llm.unhealthy is not None
            late = await connected(host, 1)
            await closed(late)
            assert late.unhealthy == llm.unhealthy

    asyncio.run(main())


async def closed(llm: RemoteLLM) -> None:
    async with asyncio.timeout(60):
        while llm.closed is None:
            await asyncio.sleep(0.001)


def test_gauges_come_from_the_engine() -> None:
    async def main() -> None:
        with GatedDevice() as device:
            async with hosted(engine_on(device)) as (_, llm):
                device.permits.release()
                outputs = await begun(llm)
                assert (await llm.fetch_stats()).num_running == 1
                device.permits.release(1000)
                await outputs.aclose()

    asyncio.run(main())


def test_what_became_of_a_prediction_is_told() -> None:
    async def main() -> None:
        engine = counting_engine(speculative="ngram", num_speculative_tokens=3)
        async with hosted(engine) as (_, remote):
            params = greedy(prediction="bcQQfgh", max_tokens=8)
            outputs = [o async for o in remote.generate("a", params, "id", output_kind="delta")]
        assert "".join(each.outputs[0].text for each in outputs) == "bcdefghi"
        assert outputs[-1].accepted_prediction_tokens > 0
        assert outputs[-1].rejected_prediction_tokens > 0

    asyncio.run(main())
