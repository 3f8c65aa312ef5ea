"""What an HTTP API is to the server: its routes, and how it tells an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.routing import Match, Route
from starlette.types import Scope

from slipstream.server.core.refusal import Kind, Refusal

STATUSES: Mapping[Kind, int] = {
    "invalid": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "wrong_method": 405,
    "too_large": 413,
    "busy": 429,
    "unavailable": 503,
    "failed": 503,
    "internal": 500,
}
# What the statuses of errors mean.
ERRORS: Mapping[int, str] = {
    400: "The request asks for something impossible or unknown.",
    401: "No API key, or an unknown one.",
    403: "The server was asked by a name that is not its own.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait already; `Retry-After` says when to come again.",
    500: "A bug.",
    503: "The server is shutting down, its engine has stopped, or a step failed on the device.",
}


def error_responses(
    model: type[BaseModel], errors: Mapping[int, str] = ERRORS
) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of an API whose errors have the shape of ``model``; ``errors`` says what
    each status means."""
    return {code: {"model": model, "description": text} for code, text in errors.items()}


@dataclass(frozen=True)
class Api:
    """One API among those of a server.

    ``error_body`` gives the JSON of a refusal, and ``responses`` describes the answers that are
    errors, by status, for ``/openapi.json``. ``statuses`` are the API's own.
    """

    router: APIRouter
    error_body: Callable[[Refusal], bytes]
    responses: dict[int | str, dict[str, Any]]
    statuses: Mapping[Kind, int] = field(default_factory=lambda: STATUSES)


@dataclass(frozen=True)
class Apis:
    """The APIs of a server; the first also speaks for paths that are nobody's."""

    apis: Sequence[Api]

    @property
    def first(self) -> Api:
        """Who speaks for the server itself."""
        return self.apis[0]

    def refuse(self, scope: Scope, refusal: Refusal) -> Response:
        """The answer to a request, in the shape of the API that it was sent to."""
        api = self._api_of(scope)
        status, body = api.statuses[refusal.kind], api.error_body(refusal)
        return Response(body, status, _headers(refusal), "application/json")

    def _api_of(self, scope: Scope) -> Api:
        for api in self.apis:
            if any(route.matches(scope)[0] is not Match.NONE for route in api.router.routes):
                return api
        return self._owner_of(scope["path"]) or self.first

    def _owner_of(self, path: str) -> Api | None:
        """Whose route leads to a path that is no route: /v1/messages to /v1/messages/batches."""
        leading = [
            (len(route.path), api)
            for api in self.apis
            for route in api.router.routes
            if isinstance(route, Route) and path.startswith(route.path + "/")
        ]
        return max(leading, key=itemgetter(0), default=(0, None))[1]


def _headers(refusal: Refusal) -> dict[str, str]:
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.kind == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.kind == "too_large":  # closing spares both sides the rest of the body
        headers["Connection"] = "close"
    return headers
