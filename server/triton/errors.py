"""Errors of a request, and Triton's codes for them."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.errors import CapacityError, InvalidRequestError, SlipstreamError


class CancelledError(SlipstreamError):
    """Nobody waits for the answer any more."""


_CODES: Mapping[type[SlipstreamError], str] = {
    InvalidRequestError: "INVALID_ARG",
    CapacityError: "INVALID_ARG",
    CancelledError: "CANCELLED",
}


def code_of(error: SlipstreamError) -> str:
    """The name of a code of Triton's ``TritonError``."""
    return _CODES.get(type(error), "INTERNAL")
