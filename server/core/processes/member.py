"""A process that answers requests, and asks another one, which has the engine, for tokens."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from slipstream.errors import ExecutionError
from slipstream.runtime.remote.client import RemoteLLM
from slipstream.runtime.remote.link import Answerer, Link
from slipstream.server.core.http.api import Api
from slipstream.server.core.http.app import Counting, create_app
from slipstream.server.core.http.process import DrainingServer, uvicorn_config
from slipstream.server.core.http_metrics import HttpTally
from slipstream.server.core.logs import structured_logs
from slipstream.server.core.metrics import Gathered, Tally
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
from slipstream.server.core.service import Service

_LOG = logging.getLogger(__name__)
_TICKS = 10  # between two tellings of what was counted: a second
# Gives an application what it shares with those of other processes, asked for over the link.
Share = Callable[[FastAPI, Link], None]


class MemberServer(DrainingServer):
    """Drains and ends when it is told to, or when the engine's process has ended. Signals are for
    that one, which every one of them reaches too."""

    def __init__(
        self, config: uvicorn.Config, service: Service, link: Link, counted: Counted
    ) -> None:
        super().__init__(config, service)
        self._link = link
        self._counted = counted

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await uvicorn.Server.startup(self, sockets)
        self._link.send(Ready())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore a signal."""

    def drain(self) -> None:
        """Begin to refuse requests."""
        if self._drain is None:
            self._drain = asyncio.create_task(self.service.drain())
            self._drain.add_done_callback(lambda _: self._link.send(Drained()))

    def end(self, now: bool) -> None:
        """End; ``now``: without waiting for clients."""
        self.should_exit = True
        self.force_exit = now

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true: stop."""
        if not self.service.llm.check_health():
            self.drain()
            if self._link.is_lost and self._drain is not None and self._drain.done():
                self.end(now=False)
        if counter % _TICKS == 0:
            self._link.send(self._counted)  # so that little is lost with this process
        return await uvicorn.Server.on_tick(self, counter)


def run_member(
    link: socket.socket, listener: socket.socket, places: int, apis: Sequence[Api], share: Share
) -> None:
    """Serve until told to end; ``places`` is the file of the shared ones."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    settle()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(link, listener, places, apis, share))


async def _serve(
    connection: socket.socket,
    listener: socket.socket,
    places: int,
    apis: Sequence[Api],
    share: Share,
) -> None:
    tally, answers = Tally(), HttpTally()

    async def counted(_: object) -> Counted:
        return Counted(tally, answers)

    answerers: dict[str, Answerer] = {COUNTED: counted}
    link = await Link.over(connection, answerers)
    try:
        setup: Setup = await link.ask(SETUP)
    except ExecutionError:  # the engine could not be loaded, and its process has said so
        return
    llm = RemoteLLM(setup.model, link)
    with structured_logs(setup.options.log_format), open(places, "r+b", buffering=0) as file:

        async def gather() -> Gathered:
            gathered: Gathered = await link.ask(METRICS)
            return gathered

        service = Service(llm, setup.options, tally, Places(file, setup.rows, setup.row))
        app = create_app(service, Counting(tally, answers, gather), apis)
        share(app, link)
        server = MemberServer(uvicorn_config(app), service, link, Counted(tally, answers))
        freeze()
        link.listen(lambda message: _hear(message, server, llm), llm.lost)
        await server.serve([listener])
        llm.shutdown()


def _hear(
    message: Any,  # noqa: ANN401 - of several kinds
    server: MemberServer,
    llm: RemoteLLM,
) -> None:
    match message:
        case Drain():
            server.drain()
        case Exit(now):
            server.end(now)
        case _:
            llm.received(message)
