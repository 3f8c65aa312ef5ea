"""Prompts handed over between two engines of this process, by files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.handover.workers import Worker, worker_on
from tests.server.devices import Device, GatedDevice, engine_on

from slipstream.errors import InvalidRequestError
from slipstream.runtime.handover.exchange import NOTHING
from slipstream.runtime.handover.files import FileTransport
from slipstream.runtime.testing import counting_engine

ONE = 1 / (1 << 30)
SLOTS = 8
PROMPT = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


@asynccontextmanager
async def worker(
    directory: Path,
    fingerprint: str | None = None,
    timeout: float = 60,
    device: Device | None = None,
) -> AsyncIterator[Worker]:
    options: dict[str, Any] = {"kv_transfer_gib": SLOTS * ONE}
    engine = counting_engine(**options) if device is None else engine_on(device, **options)
    async with worker_on(engine, directory, fingerprint, timeout) as made:
        yield made


def test_a_prompt_is_computed_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with worker(tmp_path) as first, worker(tmp_path) as second:
            told = await first.prefill(PROMPT)
            assert told["do_remote_prefill"] and not told["do_remote_decode"]
            assert first.files == [told["transfer_id"]] and not first.exchange.is_quiescent()
            assert await second.decode(told, PROMPT) == [13, 14, 15, 16, 17]
            assert second.llm.stats.handed == len(PROMPT) - 1
            assert second.llm.stats.step_tokens.sum == 5
            assert not first.files
            for each in (first, second):
                await each.rest()
                assert each.exchange.is_quiescent()
            sent, received = first.exchange.stats.sent, second.exchange.stats.received
            assert sent.prompts == received.prompts == 1
            assert sent.num_bytes == received.num_bytes == 3 * 4 * 4
            assert not second.exchange.stats.lost

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "none"),
        (NOTHING, "none"),
        ("text", "none"),
        ({"do_remote_prefill": True}, "missing"),
        ({"do_remote_prefill": True, "transfer_id": 7}, "missing"),
        ({"do_remote_prefill": True, "transfer_id": "../../etc/passwd"}, "missing"),
        ({"do_remote_prefill": True, "transfer_id": "0" * 32}, "missing"),
    ],
)
def test_without_pages_the_prompt_is_computed(tmp_path: Path, change: object, reason: str) -> None:
    async def run() -> None:
        async with worker(tmp_path) as one:
            assert await one.decode(change, PROMPT) == [13, 14, 15, 16, 17]
            assert one.exchange.stats.lost == {reason: 1}
            assert one.llm.stats.step_tokens.sum == len(PROMPT) + 4
            await one.rest()

    asyncio.run(run())


def test_pages_of_another_prompt_caller_or_engine_are_not_taken(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            worker(tmp_path) as first,
            worker(tmp_path) as second,
            worker(tmp_path, "another") as other,
        ):
            told = await first.prefill(PROMPT, "a")
            changed = [*PROMPT[:3], 0, *PROMPT[4:]]
            assert await second.decode(told, changed, "a") == [13, 14, 15, 16, 17]
            assert await second.decode(told, PROMPT, "b") == [13, 14, 15, 16, 17]
            assert second.exchange.stats.lost == {"prompt": 2}
            assert await other.decode(told, PROMPT, "a") == [13, 14, 15, 16, 17]
            assert other.exchange.stats.lost == {"engine": 1}
            assert first.files, "it waits for whom it is for"
            assert await second.decode(told, PROMPT, "a", 2) == [13, 14]
            assert second.llm.stats.handed == len(PROMPT) - 1 and not first.files

    asyncio.run(run())


def test_offers_that_nobody_takes_are_freed(tmp_path: Path) -> None:
    async def run() -> None:
        async with worker(tmp_path, timeout=0.05) as first, worker(tmp_path, timeout=0.05) as other:
            told = await first.prefill(PROMPT)
            while first.exchange.stats.expired + other.exchange.stats.expired < 1:
                await asyncio.sleep(0.01)
            assert not first.files and first.exchange.is_quiescent()
            assert await other.decode(told, PROMPT) == [13, 14, 15, 16, 17]
            assert other.exchange.stats.lost == {"missing": 1}
        async with worker(tmp_path) as ending:
            await ending.prefill(PROMPT)
            assert ending.files
        assert not ending.files, "an orderly end leaves nothing"

    asyncio.run(run())


def test_an_end_waits_for_copies_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    offer = FileTransport.offer

    def slowly(*arguments: Any) -> Any:  # noqa: ANN401
        begun.set()
        go_on.wait()
        return offer(*arguments)

    monkeypatch.setattr(FileTransport, "offer", slowly)

    async def run() -> None:
        async with worker(tmp_path) as first:
            sending = asyncio.create_task(first.prefill(PROMPT))
            await asyncio.to_thread(begun.wait)
            assert not first.exchange.is_quiescent()
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            go_on.set()
        assert not first.files

    asyncio.run(run())


def test_what_nobody_hears_of_is_withdrawn(tmp_path: Path) -> None:
    async def run() -> None:
        async with worker(tmp_path) as first:
            with pytest.raises(ConnectionError):
                async with first.exchange.sending(PROMPT, "") as sending:
                    await first.answer(PROMPT, 1, "", sending.handover)
                    await sending.send()
                    assert first.files
                    raise ConnectionError("the client has left")
            await first.rest()
            assert not first.files

    asyncio.run(run())


def test_requests_that_are_refused_or_leave_give_their_slots_back(tmp_path: Path) -> None:
    async def run() -> None:
        with GatedDevice() as device:
            async with worker(tmp_path, device=device) as first:
                for way in (
                    first.exchange.sending(PROMPT, ""),
                    first.exchange.receiving({}, [], ""),
                ):
                    with pytest.raises(InvalidRequestError):
                        async with way as made:
                            await first.answer([9999], 1, "", getattr(made, "handover", made))
                await first.rest()
                waits = asyncio.create_task(first.prefill(PROMPT))  # for its device
                await asyncio.to_thread(device.waiting.wait)
                waits.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waits
                device.permits.release(1000)
                await first.rest()
                assert not first.files

    asyncio.run(run())


def test_who_stops_waiting_for_the_engine_keeps_no_slots(tmp_path: Path) -> None:
    async def run() -> None:
        async with worker(tmp_path) as first:
            with pytest.raises(TimeoutError):
                async with first.exchange.sending(PROMPT, "") as sending:
                    await asyncio.wait_for(sending.send(), 0.01)  # of no request
            await first.rest()

    asyncio.run(run())


def test_prompts_wait_for_slots_and_longer_ones_do_without(tmp_path: Path) -> None:
    async def run() -> None:
        async with worker(tmp_path) as first, worker(tmp_path) as second:
            prompts = [[start, *PROMPT[1:]] for start in range(12)]  # three pages each
            told = await asyncio.gather(*map(first.prefill, prompts))
            answers = await asyncio.gather(*map(second.decode, told, prompts))
            assert answers == [[13, 14, 15, 16, 17]] * len(prompts)
            assert second.llm.stats.handed == len(prompts) * (len(PROMPT) - 1)
            long = PROMPT * 4
            assert await first.prefill(long) == NOTHING
            assert await second.decode({"do_remote_prefill": True, "transfer_id": "0" * 32}, long)
            assert second.exchange.stats.lost == {"room": 1}
            # Of one token there is nothing to hand over.
            assert await first.prefill([5]) == NOTHING
            assert await second.decode(NOTHING, [5], count=1) == [6]
            assert second.exchange.stats.lost == {"room": 1}

    asyncio.run(run())


def test_pages_that_the_device_cannot_copy_are_not_offered(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device()

        def broken(transfers: list[Any]) -> None:
            if transfers:
                raise RuntimeError("no copies")

        device.transfer = broken  # type: ignore[method-assign, assignment]
        async with worker(tmp_path, device=device) as first:
            assert await first.prefill(PROMPT) == NOTHING
            assert first.exchange.stats.unsent == {"device": 1}
            await first.rest()

    asyncio.run(run())
