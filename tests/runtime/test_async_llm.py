from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from tests.server.devices import GatedDevice, engine_on

from slipstream.errors import CapacityError, ExecutionError, InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.health import MAX_FAILURES
from slipstream.runtime.executors.counting import (
    CountingExecutor,
    CountingStep,
    counting_contract,
)
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import VOCAB_SIZE, counting_engine

Body = Callable[[AsyncLLM, CountingExecutor], Awaitable[None]]


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **params})


def serve(body: Body, num_pages: int = 64, **options: Any) -> None:  # noqa: ANN401
    """Run ``body`` against a fresh engine; it must leave no page in use."""
    engine = counting_engine(num_pages, **options)
    executor = engine.executor
    assert isinstance(executor, CountingExecutor)

    async def main() -> None:
        async with AsyncLLM.from_engine(engine) as llm:
            await asyncio.wait_for(body(llm, executor), timeout=120)
            await until_idle(llm)

    asyncio.run(main())
    assert executor.closed


async def until_idle(llm: AsyncLLM) -> None:
    deadline = time.monotonic() + 60
    while True:
        stats = llm.stats
        if (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0):
            return
        assert time.monotonic() < deadline, f"requests were left behind: {stats}"
        await asyncio.sleep(0.001)


class PreparingDevice(CountingExecutor):
    """Has three things to prepare, of which the second fails if it ``breaks``."""

    left, breaks = 3, False

    def prepare_next(self) -> bool:
        assert not self._on_their_way, "a step is on its way"
        self.left -= 1
        if self.breaks and self.left == 1:
            raise RuntimeError("no memory for a graph")
        return self.left > 0


@pytest.mark.parametrize("breaks", [False, True])
def test_a_device_is_prepared_while_nobody_asks(breaks: bool) -> None:
    engine = counting_engine()
    assert isinstance(engine.executor, CountingExecutor)
    device = engine.executor
    device.__class__ = PreparingDevice
    assert isinstance(device, PreparingDevice)
    device.breaks = breaks

    async def main() -> None:
        async with AsyncLLM.from_engine(engine) as llm:
            while device.left > breaks:
                await asyncio.sleep(0.001)
            output = await last(llm.generate([1, 2], greedy()))
            assert output.outputs[0].token_ids == [3, 4, 5, 6]
            assert llm.unhealthy is None
        assert device.left == int(breaks)

    asyncio.run(asyncio.wait_for(main(), timeout=60))


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


def test_many_concurrent_requests_finish_with_their_own_tokens() -> None:
    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        prompts = [[token] * (1 + token % 5) for token in range(50)]
        outputs = await asyncio.gather(*(last(llm.generate(p, greedy())) for p in prompts))
        assert [o.outputs[0].token_ids for o in outputs] == [
            [token + 1 + i for i in range(4)] for token in range(50)
        ]
        assert executor.steps < 150, "requests did not share steps"

    serve(body, num_pages=12, max_batch_size=8)


def test_outputs_stream_as_cumulative_or_delta() -> None:
    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        texts = [o.outputs[0].text async for o in llm.generate("a", greedy())]
        assert texts == ["b", "bc", "bcd", "bcde"]
        deltas = llm.generate("a", greedy(), output_kind="delta")
        assert [o.outputs[0].text async for o in deltas] == ["b", "c", "d", "e"]
        whole = llm.generate("a", greedy(), "my-id", output_kind="final")
        assert [(o.request_id, o.outputs[0].text) async for o in whole] == [("my-id", "bcde")]

    serve(body)


def test_a_conversation_goes_through_the_chat_template() -> None:
    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        messages = [{"role": "user", "content": "hi"}]
        assert (await last(llm.chat(messages, greedy()))).outputs[0].text == ";!?-"
        outputs = llm.chat(messages, greedy(max_tokens=200, ignore_eos=True))
        await anext(outputs)
        await outputs.aclose()

    serve(body, delay=0.001)


def test_a_consumer_that_stops_listening_ends_its_request_within_one_step() -> None:
    async def main() -> None:
        endless = greedy(max_tokens=200, ignore_eos=True)
        with GatedDevice() as device:
            async with AsyncLLM.from_engine(engine_on(device)) as llm:
                device.permits.release()
                outputs = llm.generate("a", endless)
                await anext(outputs)
                before = device.steps
                await outputs.aclose()
                device.permits.release(1000)
                await until_idle(llm)
                assert device.steps <= before + 2, "one on its way, one before the abort was seen"

    asyncio.run(main())


def test_a_cancelled_consumer_ends_its_request() -> None:
    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        endless = greedy(max_tokens=200, ignore_eos=True)
        for steps in range(4):
            task = asyncio.create_task(last(llm.generate("abc", endless)))
            before = executor.steps
            while executor.steps < before + steps:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_idle(llm)

    serve(body, delay=0.002)


def test_a_crowd_that_comes_and_goes_gets_its_own_tokens_and_leaves_nothing() -> None:
    async def visit(llm: AsyncLLM, token: int, patience: int) -> bool:
        outputs = llm.generate([token] * (1 + token % 6), greedy(max_tokens=8), priority=token % 3)
        async with aclosing(outputs):
            async for output in outputs:
                tokens = output.outputs[0].token_ids
                assert tokens == [token + 1 + i for i in range(len(tokens))]
                if len(tokens) == patience:
                    return False
        return len(tokens) == 8

    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        visits = [visit(llm, n % 60, patience=1 + n % 11) for n in range(150)]
        stayed = await asyncio.gather(*visits)
        assert stayed == [n % 11 >= 8 for n in range(150)]

    for policy in ("max_utilization", "guaranteed_no_evict"):
        serve(body, num_pages=7, max_batch_size=5, scheduler_policy=policy)


def test_abort_by_id_ends_the_iterator() -> None:
    async def main() -> None:
        endless = greedy(max_tokens=200, ignore_eos=True)
        with GatedDevice() as device:
            async with AsyncLLM.from_engine(engine_on(device)) as llm:
                device.permits.release()
                outputs = llm.generate("a", endless, "x")
                await anext(outputs)
                await llm.abort("x")
                await llm.abort("never seen")
                device.permits.release(1000)
                final = await last(outputs)
                assert final.finished and final.outputs[0].finish_reason == "abort"
                await until_idle(llm)

    asyncio.run(main())


def test_errors_reach_only_the_request_they_belong_to() -> None:
    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        good = asyncio.create_task(last(llm.generate("a", greedy(max_tokens=20))))
        bad: list[tuple[Any, type[Exception]]] = [
            ("", InvalidRequestError),
            ("a" * 300, InvalidRequestError),
            ("a" * 60, CapacityError),
            ([10**6], InvalidRequestError),
            (None, InvalidRequestError),
        ]
        for prompt, error in bad:
            with pytest.raises(error):
                await last(llm.generate(prompt, greedy()))
        assert (await good).outputs[0].finish_reason == "length"

    serve(body, num_pages=10, delay=0.001)


def test_a_request_id_in_use_is_refused() -> None:
    async def main() -> None:
        with GatedDevice() as device:
            async with AsyncLLM.from_engine(engine_on(device)) as llm:
                device.permits.release()
                outputs = llm.generate("a", greedy(), "x")
                await anext(outputs)
                with pytest.raises(InvalidRequestError, match="'x' is in use"):
                    await last(llm.generate("b", greedy(), "x"))
                device.permits.release(1000)
                assert (await last(outputs)).outputs[0].text == "bcde"
                assert (await last(llm.generate("b", greedy(), "x"))).outputs[0].text == "cdef"
                await until_idle(llm)

    asyncio.run(main())


def test_a_device_failure_raises_in_its_consumers_and_the_engine_goes_on() -> None:
    async def body(llm: AsyncLLM, executor: CountingExecutor) -> None:
        executor.fail_next = True
        with pytest.raises(ExecutionError, match="a step failed on the device"):
            await last(llm.generate("a", greedy()))
        assert (await last(llm.generate("a", greedy()))).outputs[0].text == "bcde"

    serve(body)


def test_a_device_that_fails_in_a_row_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = counting_engine()
        executor = engine.executor
        assert isinstance(executor, CountingExecutor)
        llm = AsyncLLM.from_engine(engine)
        for _ in range(MAX_FAILURES):
            assert llm.unhealthy is llm.closed is None
            executor.fail_next = True
            with pytest.raises(ExecutionError, match="fail this step"):
                await last(llm.generate("a", greedy()))
        with pytest.raises(ExecutionError, match="failed 5 steps in a row"):
            while True:  # the engine's thread may not have come to it yet
                await last(llm.generate("a", greedy()))
        assert llm.unhealthy and llm.closed == llm.unhealthy
        await asyncio.to_thread(llm.shutdown)
        assert executor.closed

    asyncio.run(main())
    assert "the engine is given up" in caplog.text


def test_a_device_that_hangs_is_given_up_while_its_step_is_waited_for() -> None:
    entered, released = threading.Event(), threading.Event()

    class Hanging(CountingExecutor):
        def land(self, step: CountingStep) -> None:
            entered.set()
            released.wait()
            super().land(step)

    now = [0.0]
    engine = counting_engine()
    executor = Hanging(64, *counting_contract(4, VOCAB_SIZE))

    async def main() -> None:
        engine_ = replace(engine, executor=executor)
        llm = AsyncLLM.from_engine(engine_, clock=lambda: now[0])
        answer = asyncio.create_task(last(llm.generate("a", greedy())))
        await asyncio.to_thread(entered.wait)
        assert llm.check_health() and llm.unhealthy is None
        now[0] += engine.config.step_timeout + 1
        assert not llm.check_health()
        with pytest.raises(ExecutionError, match="has not answered for 601 seconds"):
            await answer
        with pytest.raises(ExecutionError, match="has not answered"):
            await last(llm.generate("a", greedy()))
        assert llm.closed == llm.unhealthy
        released.set()
        await asyncio.to_thread(llm.shutdown)
        assert executor.closed, "an answer that comes late finds nobody and stops the engine"

    asyncio.run(main())


def test_the_event_loop_runs_on_while_the_device_computes() -> None:
    """Only the event loop opens the device's gate, which a loop that waited for a step would find
    closed."""

    class Impatient(GatedDevice):
        def land(self, step: CountingStep) -> None:
            opened.append(self.permits.acquire(timeout=60))
            super(GatedDevice, self).land(step)

    opened: list[bool] = []

    async def main() -> None:
        device = Impatient()
        async with AsyncLLM.from_engine(engine_on(device)) as llm:
            task = asyncio.create_task(last(llm.generate("a", greedy(max_tokens=3))))
            for steps in (1, 2, 3):
                while device.steps < steps:
                    await asyncio.sleep(0)
                device.permits.release()
            await task

    asyncio.run(main())
    assert opened == [True] * 3, "a step was waited for"


def test_shutdown_ends_open_requests_and_refuses_new_ones() -> None:
    async def main() -> None:
        llm = AsyncLLM.from_engine(counting_engine(4096, delay=0.001, max_seq_len=10_000))
        outputs = llm.generate("a", greedy(max_tokens=9_000, ignore_eos=True))
        await anext(outputs)
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(ExecutionError, match="was shut down"):
            await last(outputs)
        with pytest.raises(ExecutionError, match="was shut down"):
            await last(llm.generate("a", greedy()))

    asyncio.run(main())


@pytest.mark.parametrize("kind", [ZeroDivisionError, BaseException])
def test_a_broken_engine_loop_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """What a Rust library raises when it panics is no ``Exception``."""

    async def main() -> None:
        llm = AsyncLLM.from_engine(counting_engine())

        def broken() -> None:
            raise kind("a bug")

        monkeypatch.setattr(llm._loop, "step", broken)
        for _ in range(2):
            with pytest.raises(ExecutionError, match=r"the engine loop stopped: .*a bug"):
                await last(llm.generate("a", greedy()))
        assert not llm.check_health() and llm.unhealthy == llm.closed
        await asyncio.to_thread(llm.shutdown)

    asyncio.run(main())
    assert "the engine loop stopped" in caplog.text


def test_an_event_loop_that_closed_with_requests_open_leaves_no_pages_in_use() -> None:
    device = GatedDevice()
    llm = AsyncLLM.from_engine(engine_on(device))
    device.permits.release()

    async def leave() -> None:
        outputs = llm.generate("a", greedy(max_tokens=200, ignore_eos=True))
        await anext(outputs)
        left.append(outputs)  # so that it is not closed with the event loop

    left: list[AsyncIterator[RequestOutput]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    device.permits.release(1000)

    async def use() -> None:
        assert (await last(llm.generate("a", greedy()))).outputs[0].text == "bcde"
        await until_idle(llm)

    asyncio.run(use())
    llm.shutdown()
    assert device.steps < 50, "the request went on without a listener"


def test_a_template_blocks_nobody_and_does_not_outlive_the_engine() -> None:
    """Rendering has a thread of its own: the pool that encodes prompts stays free, and what waits
    for the thread is given up at the end."""
    begun, release = threading.Event(), threading.Event()

    def render() -> str:
        begun.set()
        release.wait()
        return "rendered"

    async def main() -> None:
        llm = AsyncLLM.from_engine(counting_engine())
        running = asyncio.create_task(llm.render(render))
        waiting = [asyncio.create_task(llm.render(render)) for _ in range(50)]
        await asyncio.to_thread(begun.wait)
        assert (await last(llm.generate("a", greedy()))).outputs[0].text == "bcde"

        await asyncio.to_thread(llm.shutdown)
        given_up = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, ExecutionError) for error in given_up)
        release.set()
        assert await running == "rendered"
        with pytest.raises(ExecutionError, match="shut down"):
            await llm.render(render)

    asyncio.run(main())
