"""Why a request is not answered, in words that every API renders in its own shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from slipstream.errors import (
    CapacityError,
    ContextLengthError,
    ExecutionError,
    InvalidRequestError,
    SlipstreamError,
)

# invalid       the request asks for something impossible or unknown.
# unauthorized  it carries no key that is known.
# forbidden     it came by a name of the server that a web page could have made up.
# not_found     there is no such model, or no such path.
# wrong_method  there is, but not for this method.
# too_large     its body is larger than the server takes.
# busy          too many requests wait already.
# unavailable   the server drains, or its engine has stopped.
# failed        a step, or its row of one, failed on the device; others are answered.
# internal      a bug.
Kind = Literal[
    "invalid", "unauthorized", "forbidden", "not_found", "wrong_method", "too_large", "busy",
    "unavailable", "failed", "internal",
]  # fmt: skip

_KINDS: Mapping[type[SlipstreamError], Kind] = {
    InvalidRequestError: "invalid",
    ContextLengthError: "invalid",
    CapacityError: "invalid",
    ExecutionError: "failed",
}
# OpenAI's word, by which clients know that a shorter conversation would be answered.
_CODES: Mapping[type[SlipstreamError], str] = {
    ContextLengthError: "context_length_exceeded",
    CapacityError: "context_length_exceeded",
}

_LONGEST = 1200  # characters of a message; what clients sent is quoted in part
_LONGEST_PARAM = 100


class Refusal(SlipstreamError):
    """A request is not answered, or not to its end.

    A long ``message`` is told without its middle, since its end is what to do. ``code`` is a word
    for programs, and ``retry_after`` the seconds after which it may be sent again.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(message, param=param and param[:_LONGEST_PARAM])
        self.kind = kind
        self.message = message
        self.code = code
        self.retry_after = retry_after


def refusal_of(error: SlipstreamError) -> Refusal:
    """What a surface says of an error."""
    if isinstance(error, Refusal):
        return error
    return Refusal(
        _KINDS.get(type(error), "internal"),
        str(error),
        param=error.param,
        code=_CODES.get(type(error)),
    )


@contextmanager
def naming(fields: Mapping[str, str]) -> Iterator[None]:
    """Call parameters of the engine, in errors raised inside, as the fields of a request."""
    try:
        yield
    except SlipstreamError as error:
        error.param = fields.get(error.param or "", error.param)
        raise


def internal_refusal() -> Refusal:
    """What is said of a bug; the log has the rest."""
    return Refusal(
        "internal", "an error inside the server; its log has the details under this request"
    )
