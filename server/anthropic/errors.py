"""Errors in Anthropic's shape: an object of type ``error``, with the error and ``request_id``."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel

from slipstream.server.core.http.api import ERRORS, STATUSES, error_responses
from slipstream.server.core.logs import request_id
from slipstream.server.core.refusal import Kind, Refusal

_TYPES: dict[Kind, str] = {
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "too_large": "request_too_large",
    "busy": "rate_limit_error",
    "unavailable": "overloaded_error",
    "failed": "api_error",
    "internal": "api_error",
}
# Its own status for a server that cannot answer now; its clients send such a request again.
ANTHROPIC_STATUSES = {**STATUSES, "unavailable": 529, "failed": 500}
_ERRORS = {
    **{code: text for code, text in ERRORS.items() if code < 500},
    500: "A bug, or a step that failed on the device.",
    529: "The server is shutting down, or its engine has stopped.",
}


class MessageErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """Every answer that is an error, and the event that ends a stream."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None


RESPONSES = error_responses(MessageErrorBody, _ERRORS)


def error_body(refusal: Refusal) -> bytes:
    """The JSON; ASCII, because a message may quote what is no valid Unicode."""
    error = {
        "type": _TYPES.get(refusal.kind, "invalid_request_error"),
        "message": refusal.message,
    }
    return json.dumps({"type": "error", "error": error, "request_id": request_id.get()}).encode()
