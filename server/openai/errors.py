"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from slipstream.errors import (
    CapacityError,
    ExecutionError,
    InvalidRequestError,
    SlipstreamError,
)

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_STATUSES: Mapping[type[SlipstreamError], int] = {
    InvalidRequestError: 400,
    CapacityError: 400,
    ExecutionError: 503,
}


class ApiError(Exception):
    """An answer that is an error: ``param`` is the field it is about, ``code`` a word for programs.

    ``type`` follows from the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The JSON; ASCII, because a message may quote what is no valid Unicode."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The HTTP response."""
        return Response(self.body(), self.status, self.headers, "application/json")


def internal_error() -> ApiError:
    """What is said of a bug; the log has the rest."""
    return ApiError(500, "an error inside the server; its log has the details under this request")


def as_api_error(error: ApiError | SlipstreamError) -> ApiError:
    """The answer to an error of the engine's."""
    if isinstance(error, ApiError):
        return error
    return ApiError(_STATUSES.get(type(error), 500), str(error))


def install_handlers(app: FastAPI) -> None:
    """Answer every error of a handler, of validation and of routing in this shape."""
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(SlipstreamError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError | SlipstreamError)
    return as_api_error(error).response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        400: "the body cannot be read; send a JSON object in UTF-8",
        404: f"there is no {request.url.path} here; see /openapi.json for what there is",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One 400 for what pydantic found: of the first wrong field, what it may be."""
    first = errors[0]
    kind, path = first["type"], [part for part in first["loc"] if part not in ("body", "path")]
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is no valid JSON: {detail} at character {path[0]}")
    if not path:
        return ApiError(
            400, "the body must be a JSON object sent with Content-Type: application/json"
        )
    name = str(path[0])
    if kind == "extra_forbidden":
        where = ".".join(map(str, path))
        return ApiError(400, f"unknown field {where!r}; leave it out", param=where)
    if kind == "missing":
        return ApiError(400, f"{'.'.join(map(str, path))} is missing", param=name)
    about = [error for error in errors if error["loc"][: len(first["loc"]) - len(path) + 1]
             == first["loc"][: len(first["loc"]) - len(path) + 1]]  # fmt: skip
    wanted = dict.fromkeys(_sentence(error["msg"]) for error in about)
    return ApiError(400, f"{name}: {'; or '.join(wanted)}", param=name)


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
