"""Errors of handlers, of validation and of routing as refusals."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from slipstream.errors import SlipstreamError
from slipstream.server.core.http.api import STATUSES, Apis
from slipstream.server.core.refusal import Kind, Refusal, refusal_of

_PLACES = ("body", "path", "query")
_KINDS: Mapping[int, Kind] = {status: kind for kind, status in STATUSES.items()}


def install_handlers(app: FastAPI, apis: Apis) -> None:
    """Answer every error in the shape of the API that was asked."""
    meanings: Mapping[type[Exception], Callable[[Request, Any], Refusal]] = {
        SlipstreamError: lambda _, error: refusal_of(error),
        RequestValidationError: lambda _, error: _invalid(error.errors()),
        HTTPException: _unroutable,
    }
    for kind, meaning in meanings.items():
        app.add_exception_handler(kind, _handler(apis, meaning))


def _handler(
    apis: Apis, meaning: Callable[[Request, Any], Refusal]
) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        response = apis.refuse(request.scope, meaning(request, error))
        if isinstance(error, HTTPException):  # such as the methods that a path takes
            response.headers.update(error.headers or {})
        return response

    return answer


def _unroutable(request: Request, error: HTTPException) -> Refusal:
    if isinstance(error.__cause__, SlipstreamError):  # while the body was read
        return refusal_of(error.__cause__)
    messages = {
        400: "the body cannot be read; send a JSON object in UTF-8, without Content-Encoding, of "
        "numbers of at most 4,300 digits",
        404: f"there is no {request.url.path:.100} here; see /openapi.json for what there is",
        405: f"{request.url.path:.100} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return Refusal(_KINDS.get(error.status_code, "invalid"), message)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """One refusal for what pydantic found: of the first wrong field, what it may be."""
    first = errors[0]
    kind, path = first["type"], list(first["loc"])
    if path and path[0] in _PLACES:
        del path[0]
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        return Refusal("invalid", f"the body is no valid JSON: {detail} at character {path[0]}")
    if kind == "string_unicode" and not path:
        return Refusal("invalid", "a field's name is not valid Unicode; send the fields there are")
    if not path:
        return Refusal(
            "invalid", "the body must be a JSON object sent with Content-Type: application/json"
        )
    name = str(path[0])
    if kind == "extra_forbidden":
        where = ".".join(map(str, path))
        return Refusal("invalid", f"unknown field {where!r:.100}; leave it out", param=where)
    if kind == "missing":
        return Refusal("invalid", f"{'.'.join(map(str, path))} is missing", param=name)
    about = [error for error in errors if error["loc"][: len(first["loc"]) - len(path) + 1]
             == first["loc"][: len(first["loc"]) - len(path) + 1]]  # fmt: skip
    wanted = dict.fromkeys(_sentence(error["msg"]) for error in about)
    return Refusal("invalid", f"{name}: {'; or '.join(wanted)}", param=name)


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
