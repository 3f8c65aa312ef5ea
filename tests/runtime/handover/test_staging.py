"""Who gets slots, and when."""

from __future__ import annotations

import asyncio

from slipstream.runtime.handover.staging import SlotPool


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_slots_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    async def run() -> None:
        pool = SlotPool(range(4))
        first = await pool.take(3)
        many, one = (asyncio.create_task(pool.take(count)) for count in (2, 1))
        await settle()
        assert not many.done() and not one.done(), "one is there, but another has asked before"
        pool.give(first[:1])
        await settle()
        assert many.done() and not one.done()
        pool.give(first[1:])
        assert sorted([*await many, *await one, *await pool.take(1)]) == [0, 1, 2, 3]

    asyncio.run(run())


def test_who_does_not_wait_any_more_gets_none() -> None:
    async def run() -> None:
        pool = SlotPool(range(4))
        held = await pool.take(3)
        many, one = (asyncio.create_task(pool.take(count)) for count in (4, 1))
        await settle()
        many.cancel()
        await settle()
        assert await one and pool.num_free == 0
        last = asyncio.create_task(pool.take(1))
        await settle()
        pool.give(held)  # it has some, and does not know yet
        last.cancel()
        await settle()
        assert pool.num_free == 3

    asyncio.run(run())
