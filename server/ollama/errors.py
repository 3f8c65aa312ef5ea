"""Errors as Ollama tells them: ``{"error": "..."}``."""

from __future__ import annotations

import json

from pydantic import BaseModel

from slipstream.server.core.http.api import error_responses
from slipstream.server.core.refusal import Refusal


class OllamaError(BaseModel):
    """Every answer that is an error."""

    error: str


RESPONSES = error_responses(OllamaError)


def error_body(refusal: Refusal) -> bytes:
    """The JSON, with the field if the message calls it by another name; ASCII, because a message
    may quote what is no valid Unicode."""
    message, param = refusal.message, refusal.param
    told = message if param is None or param in message else f"{param}: {message}"
    return json.dumps({"error": told}).encode()
