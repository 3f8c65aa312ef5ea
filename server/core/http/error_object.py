"""Errors as OpenAI's APIs tell them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json

from pydantic import BaseModel

from slipstream.server.core.http.api import error_responses
from slipstream.server.core.refusal import Kind, Refusal

_TYPES: dict[Kind, str] = {
    "unauthorized": "authentication_error",
    "busy": "rate_limit_error",
    "unavailable": "service_unavailable_error",
    "failed": "service_unavailable_error",
    "internal": "server_error",
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


RESPONSES = error_responses(ErrorBody)


def error_body(refusal: Refusal) -> bytes:
    """The JSON; ASCII, because a message may quote what is no valid Unicode."""
    error = {
        "message": refusal.message,
        "type": _TYPES.get(refusal.kind, "invalid_request_error"),
        "param": refusal.param,
        "code": refusal.code,
    }
    return json.dumps({"error": error}).encode()
