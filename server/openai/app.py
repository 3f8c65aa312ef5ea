"""The application: routes, errors and what stands around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from slipstream import __version__
from slipstream.server.openai import chat, completions, status, tokens
from slipstream.server.openai.errors import install_handlers
from slipstream.server.openai.middleware import BodyLimit, KeyGuard, RequestLog
from slipstream.server.openai.service import Service

_STATUSES = {
    400: "The request asks for something impossible or unknown.",
    401: "No API key, or an unknown one.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait already; `Retry-After` says when to come again.",
    500: "A bug.",
    503: "The server is shutting down, or its engine has stopped.",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


def create_app(service: Service) -> FastAPI:
    """The application of one service."""
    app = FastAPI(
        title="Slipstream",
        summary="An OpenAI-compatible server",
        version=__version__,
        docs_url=None,  # the viewers come from a content network
        redoc_url=None,
        redirect_slashes=False,
        responses={
            code: {"model": ErrorBody, "description": text} for code, text in _STATUSES.items()
        },
    )
    app.state.service = service
    for router in (chat.router, completions.router, tokens.router, status.router):
        app.include_router(router)
    app.openapi = _openapi(app)  # type: ignore[method-assign]
    install_handlers(app)
    _surround(app, service)
    return app


def _surround(app: FastAPI, service: Service) -> None:
    """Middleware, from the innermost to the outermost."""
    options = service.options
    app.add_middleware(BodyLimit, max_bytes=options.max_request_bytes)
    if options.api_key:
        app.add_middleware(KeyGuard, keys=options.api_key)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog)


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
