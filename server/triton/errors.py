"""Errors of a request, and Triton's codes for them."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.errors import SlipstreamError
from slipstream.server.core.refusal import Kind, refusal_of


class CancelledError(SlipstreamError):
    """Nobody waits for the answer any more."""


_CODES: Mapping[Kind, str] = {
    "invalid": "INVALID_ARG",
    "busy": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
}


def code_of(error: SlipstreamError) -> str:
    """The name of a code of Triton's ``TritonError``."""
    if isinstance(error, CancelledError):
        return "CANCELLED"
    return _CODES.get(refusal_of(error).kind, "INTERNAL")
