"""Errors as OpenAI's APIs tell them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from slipstream.server.core.refusal import Kind, Refusal

_TYPES: dict[Kind, str] = {
    "unauthorized": "authentication_error",
    "busy": "rate_limit_error",
    "unavailable": "service_unavailable_error",
    "failed": "service_unavailable_error",
    "internal": "server_error",
}
_STATUSES = {
    400: "The request asks for something impossible or unknown.",
    401: "No API key, or an unknown one.",
    403: "The server was asked by a name that is not its own.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait already; `Retry-After` says when to come again.",
    500: "A bug.",
    503: "The server is shutting down, its engine has stopped, or a step failed on the device.",
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


RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": text} for code, text in _STATUSES.items()
}


def error_body(refusal: Refusal) -> bytes:
    """The JSON; ASCII, because a message may quote what is no valid Unicode."""
    error = {
        "message": refusal.message,
        "type": _TYPES.get(refusal.kind, "invalid_request_error"),
        "param": refusal.param,
        "code": refusal.code,
    }
    return json.dumps({"error": error}).encode()
