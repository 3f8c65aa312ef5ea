"""The application: the routes of its APIs, errors and what stands around them."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from slipstream import __version__
from slipstream.server.core.http import status
from slipstream.server.core.http.api import Api, Apis
from slipstream.server.core.http.errors import install_handlers
from slipstream.server.core.http.middleware import (
    BodyLimit,
    BodyReader,
    Count,
    HeadAsGet,
    HostGuard,
    KeyGuard,
    RequestLog,
)
from slipstream.server.core.http.structure import StructureLimit
from slipstream.server.core.http_metrics import HttpTally
from slipstream.server.core.limits import MAX_VALUES
from slipstream.server.core.metrics import EngineState, Gathered, Tally
from slipstream.server.core.service import Service


@dataclass(frozen=True, slots=True)
class Counting:
    """Where a process counts, and how it learns what all of its server have counted; None: there is
    no other."""

    tally: Tally = field(default_factory=Tally)
    answers: HttpTally = field(default_factory=HttpTally)
    gather: Callable[[], Awaitable[Gathered]] | None = None


def create_app(service: Service, counting: Counting, apis: Sequence[Api]) -> FastAPI:
    """The application of one service; the first of ``apis`` also words the server's own errors."""
    app = FastAPI(
        title="Slipstream",
        summary="An OpenAI-compatible server",
        version=__version__,
        docs_url=None,  # the viewers come from a content network
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.gather = counting.gather or partial(_gather, service, counting)
    known = Apis(apis)
    for api in apis:
        app.include_router(api.router, responses=api.responses)
    app.include_router(status.router, responses=known.first.responses)
    app.openapi = _openapi(app)  # type: ignore[method-assign]
    install_handlers(app, known)
    _surround(app, service, known, counting.answers.count)
    return app


async def _gather(service: Service, counting: Counting) -> Gathered:
    llm = service.llm
    engine = EngineState(await llm.fetch_stats(), llm.config, llm.unhealthy, llm.closed)
    return Gathered(engine, [(counting.tally, counting.answers)], os.getpid())


def _surround(app: FastAPI, service: Service, apis: Apis, count: Count) -> None:
    """Middleware, from the innermost to the outermost."""
    options, refuse = service.options, apis.refuse
    app.add_middleware(HeadAsGet)
    # Token ids of the longest prompt that the engine takes must pass.
    max_values = MAX_VALUES + service.llm.config.max_seq_len
    app.add_middleware(StructureLimit, max_values=max_values)
    app.add_middleware(BodyLimit, max_bytes=options.max_request_bytes, refuse=refuse)
    if options.api_key:
        app.add_middleware(KeyGuard, keys=options.api_key, refuse=refuse)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if options.is_local:
        app.add_middleware(HostGuard, allowed=options.allowed_hosts, refuse=refuse)
    app.add_middleware(BodyReader)
    app.add_middleware(RequestLog, refuse=refuse, count=count)


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The document, without the 422 that FastAPI adds: what is invalid is answered with 400."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes
            )
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = document
        return app.openapi_schema

    return describe
