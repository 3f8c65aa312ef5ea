"""Hands prompts over between this engine and others, through slots of the host and a transport."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from slipstream.runtime.engine.handover import Handover
from slipstream.runtime.handover.label import Labels
from slipstream.runtime.handover.staging import SlotPool, Staging
from slipstream.runtime.handover.stats import HandoverStats, Way
from slipstream.runtime.handover.transport import LostHandover, Transport

_LOG = logging.getLogger(__name__)
_SWEEPS = 8  # in the time that an offer lasts
_THREADS = 4  # that copy: one is as fast as memory, the others wait less for long prompts
T = TypeVar("T")
# What a request asks for, and an answer says, in vLLM's words.
_REMOTE_PREFILL, _REMOTE_DECODE = "do_remote_prefill", "do_remote_decode"
NOTHING: Mapping[str, Any] = {_REMOTE_PREFILL: False, _REMOTE_DECODE: False}


class _Lease:
    """Slots that a prompt has until neither the engine nor a copy uses them."""

    def __init__(self, slots: list[int], num_tokens: int, *, stores: bool) -> None:
        self.slots = slots
        self.handover = Handover(slots, num_tokens, stores, self._settled)
        self._event_loop = asyncio.get_running_loop()
        self._moved: asyncio.Future[bool] = self._event_loop.create_future()
        self._copying: asyncio.Future[Any] | None = None

    async def moved(self) -> bool:
        """Wait until the engine uses the slots no more; whether it has moved the pages."""
        return await asyncio.shield(self._moved)

    async def copy(self, threads: ThreadPoolExecutor, make: Callable[[], T]) -> T:
        """Copy between slots and transport in a thread, which goes on where nobody waits for it any
        more. Raises ``LostHandover``."""
        copying = self._event_loop.run_in_executor(threads, make)
        self._copying = copying
        return await asyncio.shield(copying)

    @property
    def copies(self) -> bool:
        """Whether a copy is on its way."""
        return self._copying is None or not self._copying.done()

    async def end(self, pool: SlotPool) -> None:
        """Give the slots back as soon as that can be."""
        self.handover.leave()
        await self.moved()
        if self._copying is not None:
            with suppress(LostHandover):
                await self._copying
        pool.give(self.slots)

    def _settled(self, moved: bool) -> None:
        with suppress(RuntimeError):  # the event loop was closed while the request ran
            self._event_loop.call_soon_threadsafe(self._moved.set_result, moved)


class Sending:
    """A prompt whose pages go to another engine; ``handover`` is for its request, None where it has
    no pages to hand over or there is no room for them."""

    def __init__(self, exchange: Exchange, lease: _Lease | None, label: bytes) -> None:
        self.handover = None if lease is None else lease.handover
        self.name = secrets.token_hex(16)
        self._exchange, self._lease, self._label = exchange, lease, label

    async def send(self) -> Mapping[str, Any]:
        """Offer the pages, once the request has ended, and say how to take them: an object for
        ``Exchange.receiving``, in the form of vLLM's ``kv_transfer_params``."""
        lease = self._lease
        if lease is None:
            return NOTHING
        try:
            if not await lease.moved():
                raise LostHandover("device")
            told = await self._exchange.offer(lease, self.name, self._label)
        except LostHandover as error:
            self._exchange.note_unsent(error)
            return NOTHING
        tokens = lease.handover.num_tokens
        return {**told, **NOTHING, _REMOTE_PREFILL: True, "num_tokens": tokens}


class Exchange:
    """The handovers of one engine; belongs to an event loop.

    Slots are waited for in turn, so prompts on their way take no more memory than there is.
    Whatever goes wrong costs time only: a prompt whose pages do not come is computed.
    """

    def __init__(
        self, staging: Staging, transport: Transport, fingerprint: str, timeout: float
    ) -> None:
        """``timeout`` is that of the transport's offers."""
        self.stats = HandoverStats()
        self._staging = staging
        self._transport = transport
        self._labels = Labels(staging, fingerprint)
        self._pool = SlotPool(staging.slots)
        self._threads = ThreadPoolExecutor(_THREADS, "slipstream-handover")
        self._offered: dict[str, _Lease] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._begin(self._sweep(timeout / _SWEEPS))

    @asynccontextmanager
    async def sending(self, tokens: Sequence[int], salt: str) -> AsyncIterator[Sending]:
        """A prompt of ``tokens`` that is to be handed over; its request runs inside. What was
        offered is withdrawn where that ends in an error, such as that nobody waits any more."""
        computed = tokens[:-1]
        lease = await self._lease(len(computed), stores=True)
        sending = Sending(self, lease, self._labels.of(computed, salt))
        delivered = False
        try:
            yield sending
            delivered = True
        finally:
            if lease is not None:
                self._begin(self._end(lease, None if delivered else sending.name))

    @asynccontextmanager
    async def receiving(
        self, params: object, tokens: Sequence[int], salt: str
    ) -> AsyncIterator[Handover | None]:
        """A prompt of ``tokens`` that came with ``params``; its request runs inside. None where the
        prompt is to be computed here; that its pages are lost is counted."""
        lease = await self._received(params, tokens[:-1], salt) if len(tokens) > 1 else None
        try:
            yield None if lease is None else lease.handover
        finally:
            if lease is not None:
                self._begin(self._end(lease))

    async def offer(self, lease: _Lease, name: str, label: bytes) -> Mapping[str, Any]:
        """Have what the slots of a lease hold taken, and say how; raises ``LostHandover``."""
        self._offered[name] = lease
        make = partial(self._transport.offer, name, label, lease.slots)
        return await self._copy(self.stats.sent, lease, make)

    def note_unsent(self, error: LostHandover) -> None:
        """Count pages that cannot be offered."""
        self.stats.unsent[error.reason] += 1
        _LOG.warning("a prompt is not handed over: %s", error)

    def is_quiescent(self) -> bool:
        """Whether nothing is on its way, and all that was offered is taken or has expired."""
        self._forget()
        return not self._offered and self._pool.num_free == self._pool.num_slots

    async def close(self) -> None:
        """Withdraw what was offered, when the copies of it have ended; requests have."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        for name in self._offered:
            self._transport.withdraw(name)
        self._transport.close()

    async def _received(self, params: object, tokens: Sequence[int], salt: str) -> _Lease | None:
        lease: _Lease | None = None
        try:
            if not isinstance(params, Mapping) or not params.get(_REMOTE_PREFILL):
                raise LostHandover("none")
            lease = await self._lease(len(tokens), stores=False)
            if lease is None:
                raise LostHandover("room")
            label = self._labels.of(tokens, salt)
            make = partial(self._transport.take, params, label, lease.slots)
            await self._copy(self.stats.received, lease, make)
        except LostHandover as error:
            self.stats.lost[error.reason] += 1
            _LOG.info("a prompt of %d tokens is computed here: %s", len(tokens) + 1, error)
        except asyncio.CancelledError:
            if lease is not None:
                self._begin(self._end(lease))
            raise
        else:
            return lease
        if lease is not None:
            self._begin(self._end(lease))
        return None

    async def _lease(self, num_tokens: int, *, stores: bool) -> _Lease | None:
        """Slots for so many tokens, None for none or more than there are."""
        count = self._staging.pages_for(num_tokens)
        if not 0 < count <= self._pool.num_slots:
            return None
        return _Lease(await self._pool.take(count), num_tokens, stores=stores)

    async def _copy(self, way: Way, lease: _Lease, make: Callable[[], T]) -> T:
        began = time.perf_counter()
        made = await lease.copy(self._threads, make)
        way.prompts += 1
        way.num_bytes += len(lease.slots) * self._staging.slot_bytes
        way.seconds += time.perf_counter() - began
        return made

    async def _end(self, lease: _Lease, withdrawn: str | None = None) -> None:
        await lease.end(self._pool)
        if withdrawn is not None:
            self._transport.withdraw(withdrawn)

    async def _sweep(self, pause: float) -> None:
        while True:
            sweeping = asyncio.get_running_loop().run_in_executor(
                self._threads, self._transport.sweep
            )
            self.stats.expired += await sweeping
            self._forget()
            await asyncio.sleep(pause)

    def _forget(self) -> None:
        """Forget offers that were taken, or have expired."""
        offered, is_open = self._offered.items(), self._transport.is_open
        self._offered = {n: lease for n, lease in offered if lease.copies or is_open(n)}

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
