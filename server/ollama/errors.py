"""Errors as Ollama tells them: ``{"error": "..."}``."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from slipstream.server.core.refusal import Refusal

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


class OllamaError(BaseModel):
    """Every answer that is an error."""

    error: str


RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": OllamaError, "description": text} for code, text in _STATUSES.items()
}


def error_body(refusal: Refusal) -> bytes:
    """The JSON, with the field if the message calls it by another name; ASCII, because a message
    may quote what is no valid Unicode."""
    message, param = refusal.message, refusal.param
    told = message if param is None or param in message else f"{param}: {message}"
    return json.dumps({"error": told}).encode()
