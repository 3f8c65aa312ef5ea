"""The process that has the engine: it starts those that answer requests, and looks after them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Self, cast

import uvloop

from slipstream.errors import ExecutionError
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.remote.host import Client, EngineHost
from slipstream.runtime.remote.link import Answerer, Link
from slipstream.server.core.http.listener import share, url_of
from slipstream.server.core.http_metrics import HttpTally
from slipstream.server.core.logs import log_event
from slipstream.server.core.metrics import EngineState, Gathered, Tally
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.places import Places
from slipstream.server.core.processes.messages import (
    COUNTED,
    METRICS,
    SETUP,
    Counted,
    Drain,
    Drained,
    Exit,
    Ready,
    Setup,
)
from slipstream.server.core.processes.settings import freeze, settle

_LOG = logging.getLogger(__name__)
_TICK = 0.1  # seconds between two looks at the engine
_ANSWER_SECONDS = 2.0  # for a member to tell what it has counted
_END_SECONDS = 15.0  # for a member to end in, once it is told to
# What APIs share: answers to questions of members. They are given what returns once all that
# members have said before has been heard.
Shared = Callable[[ServerOptions, Callable[[], Awaitable[object]]], Mapping[str, Answerer]]


@dataclass(slots=True, eq=False)
class _Member:
    """A process that answers requests."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    link: Link | None = None
    client: Client | None = None
    ready: bool = False
    drained: bool = False
    counted: Counted | None = None


@dataclass(slots=True, eq=False)
class _Changes:
    """Wakes whoever waits for a condition."""

    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Something has changed."""
        self._event.set()

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until it holds; false if it does not within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._event.clear()
                    await self._event.wait()
        except TimeoutError:
            return False
        return True


class Supervisor:
    """A server whose requests are answered by several processes. They are started at once, so that
    they are there when the engine is.

    Each has a socket of its own on the same port, among which the system divides connections; this
    process keeps all of them, so that those of a process that has died wait for the next.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: ServerOptions,
        listener: socket.socket,
        count: int,
        shared: Shared,
    ) -> None:
        """``command`` is that of a process, which is given the numbers of three open files: its
        link, its listening socket and the shared places."""
        self._command = command
        self._options = options
        self._stack = ExitStack()
        self._listeners = share(listener, count)
        for each in self._listeners:
            self._stack.enter_context(each)
        self._file = self._stack.enter_context(_shared_file())
        self._places = Places(self._file, count)
        self._shared = shared(options, self._gathered)
        self._members = [self._start(row) for row in range(count)]
        self._signals = 0
        self._failure: str | None = None
        self._past = Counted(Tally(), HttpTally())  # of members that have ended
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.connection.close()
            _end(member.process)
        self._stack.close()

    def run(self, engine: LoadedEngine) -> str | None:
        """Serve an engine until a signal, or until it is unhealthy; then drain, and shut it down.
        Returns what ails the engine, None if nothing does; raises ``ExecutionError`` if a member
        cannot be started."""
        settle()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            unhealthy = runner.run(self._serve(engine))
        log_event(_LOG, "stopped", {})
        return unhealthy

    async def _serve(self, engine: LoadedEngine) -> str | None:
        self._changes = _Changes()
        self._host = host = EngineHost(engine)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)
        try:
            for row in range(len(self._members)):
                await self._attach(row)
            await self._changes.until(self._is_up)
            if not self._stops():
                freeze()
                self._log_serving()
            while not await self._changes.until(self._stops, _TICK):
                host.thread.check_health()
            await self._drain()
        finally:
            await asyncio.to_thread(host.shutdown)
        if self._failure is not None:
            raise ExecutionError(self._failure)
        return host.thread.unhealthy

    def _log_serving(self) -> None:
        names = ",".join(self._options.served_model_name)
        url, count = url_of(self._listeners[0]), len(self._members)
        log_event(_LOG, "serving", {"model": names, "url": url, "api_processes": count})

    def _signal(self) -> None:
        self._signals += 1
        self._changes.tell()

    def _is_up(self) -> bool:
        return self._stops() or all(member.ready for member in self._members)

    def _stops(self) -> bool:
        unhealthy = self._host.thread.unhealthy is not None
        return bool(self._signals or self._failure or unhealthy)

    async def _drain(self) -> None:
        """Have all members end their requests, and then themselves."""
        if (reason := self._host.thread.unhealthy) is not None:
            log_event(_LOG, "unhealthy", {"reason": reason}, logging.ERROR)
            self._host.thread.check_health()
        self._ending = True
        self._tell_all(Drain())
        await self._changes.until(self._is_drained)
        self._tell_all(Exit(now=self._signals > 1))
        await self._changes.until(self._is_alone, _END_SECONDS)

    def _is_drained(self) -> bool:
        return self._signals > 1 or all(member.drained for member in self._members)

    def _is_alone(self) -> bool:
        return all(member.link is None or member.link.is_lost for member in self._members)

    def _tell_all(self, message: object) -> None:
        for member in self._members:
            if member.link is not None:
                member.link.send(message)

    def _start(self, row: int) -> _Member:
        here, there = socket.socketpair()
        files = (there.fileno(), self._listeners[row].fileno(), self._file.fileno())
        with there:
            # In a session of its own: a terminal's Ctrl-C is for this process, which drains.
            command = [*self._command, *map(str, files)]
            process = subprocess.Popen(command, pass_fds=files, start_new_session=True)
        return _Member(process, here)

    async def _attach(self, row: int) -> None:
        """Listen to a member that was started."""
        member = self._members[row]
        own: dict[str, Answerer] = {SETUP: partial(self._setup, row), METRICS: self._metrics}
        own["stats"] = self._stats
        member.link = await Link.over(member.connection, {**own, **self._shared})
        member.client = self._host.connect(member.process.pid, member.link)
        member.link.listen(partial(self._hear, member), partial(self._lost, row, member))

    def _hear(self, member: _Member, message: Any) -> None:  # noqa: ANN401 - of several kinds
        match message:
            case Ready():
                member.ready = True
                if self._ending:  # it was started before that
                    assert member.link is not None
                    member.link.send(Drain())
            case Drained():
                member.drained = True
            case Counted():
                member.counted = message
                return
            case _:
                assert member.client is not None
                member.client.received(message)
                return
        self._changes.tell()

    def _lost(self, row: int, member: _Member) -> None:
        """A member has ended: its requests are aborted, and another one takes its place."""
        assert member.client is not None
        member.client.lost()
        member.drained = True
        self._places.clear(row)
        if member.counted is not None:
            self._past.tally.add(member.counted.tally)
            self._past.answers.add(member.counted.answers)
            member.counted = None
        self._changes.tell()
        if self._ending or self._failure:
            return
        status = _end(member.process)
        log_event(
            _LOG, "api_process_ended", {"pid": member.process.pid, "status": status}, logging.ERROR
        )
        if not member.ready:
            self._failure = (
                "a process that answers requests has ended while it started; see its log"
            )
            return
        self._members[row] = self._start(row)
        task = asyncio.get_running_loop().create_task(self._attach(row))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _setup(self, row: int, _: object = None) -> Setup:
        return Setup(self._host.model, self._options, len(self._members), row)

    async def _stats(self, _: object) -> EngineStats:
        return self._host.stats

    async def _metrics(self, _: object) -> Gathered:
        counted = [self._past, *(each for each in await self._gathered() if each is not None)]
        thread, config = self._host.thread, self._host.model.config
        engine = EngineState(self._host.stats, config, thread.unhealthy, thread.closed)
        return Gathered(engine, [(each.tally, each.answers) for each in counted], os.getpid())

    async def _gathered(self) -> list[Counted | None]:
        """What all members have counted by now; all that they said before has been heard then."""
        return await asyncio.gather(*map(self._count, list(self._members)))

    async def _count(self, member: _Member) -> Counted | None:
        if member.link is not None and member.ready:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    counted = await member.link.ask(COUNTED)
            except (TimeoutError, ExecutionError):  # it hangs, or has ended
                return member.counted
            if not member.link.is_lost:
                member.counted = counted
        return member.counted


def _shared_file() -> BinaryIO:
    """A file without a name, to be mapped."""
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))


def _end(process: subprocess.Popen[bytes]) -> int:
    """Its exit status, once it has ended; it is killed."""
    process.kill()
    return process.wait()
