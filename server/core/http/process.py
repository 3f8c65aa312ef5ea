"""The process: uvicorn, and an end that drops nobody."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
import uvloop
from fastapi import FastAPI

from slipstream.runtime.engine_client import EngineClient
from slipstream.server.core.http.api import Api
from slipstream.server.core.http.app import Counting, create_app
from slipstream.server.core.http.connection import Bounds, Connection, connection_limit
from slipstream.server.core.http.listener import url_of
from slipstream.server.core.http_metrics import HttpTally
from slipstream.server.core.logs import log_event
from slipstream.server.core.metrics import Tally
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.processes.settings import freeze, settle
from slipstream.server.core.service import Service

_LOG = logging.getLogger(__name__)
_CLOSING_SECONDS = 5  # for answers on their way to slow clients, after all requests have ended


def server_of(llm: EngineClient, options: ServerOptions, apis: Sequence[Api]) -> DrainingServer:
    """A server that can be started, once, in the running event loop."""
    counts = Counting(Tally(), HttpTally())
    service = Service(llm, options, counts.tally)
    return DrainingServer(uvicorn_config(create_app(service, counts, apis)), service)


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How an application is served."""
    return uvicorn.Config(
        app,
        http=cast(Any, partial(Connection, bounds=Bounds(connection_limit()))),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """Goes on listening while running requests end, so that health checks and new requests are
    answered with 503. An engine that becomes unhealthy ends it like a signal."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        for listener in sockets or ():
            names = ",".join(self.service.names)
            log_event(_LOG, "serving", {"model": names, "url": url_of(listener)})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; it may come between any two bytecodes."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true: stop."""
        unhealthy = not self.service.llm.check_health()
        if self._drain is None and (self._signals or unhealthy):
            if unhealthy:
                reason = self.service.llm.unhealthy
                log_event(_LOG, "unhealthy", {"reason": reason}, logging.ERROR)
            self._drain = asyncio.create_task(self.service.drain())
        if self._signals > 1:
            self.should_exit = self.force_exit = True
        if self._drain is not None and self._drain.done():
            self.should_exit = True
        return await super().on_tick(counter)


def run(
    llm: EngineClient, options: ServerOptions, listener: socket.socket, apis: Sequence[Api]
) -> str | None:
    """Serve until SIGTERM or SIGINT, or until the engine is unhealthy; then drain, then shut the
    engine down. Returns what ails the engine, None if nothing does.

    A second signal ends at once.
    """

    async def main() -> None:
        server = server_of(llm, options, apis)
        freeze()
        await server.serve([listener])

    settle()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
        unhealthy = llm.unhealthy
    finally:
        llm.shutdown()
    log_event(_LOG, "stopped", {})
    return unhealthy
