"""Every error that a user can cause.

    SlipstreamError
    ├── CheckpointError         a checkpoint cannot be read
    ├── BuildError              a checkpoint cannot be compiled with these options
    ├── EngineMismatchError     an engine does not fit this version, this machine or its own hashes
    ├── InvalidRequestError     a request asks for something impossible; also a ValueError
    │   └── ContextLengthError  its prompt is longer than the engine's context
    ├── CapacityError           a request or setting needs more memory or pages than there are
    ├── ExecutionError          a step failed on the device; its requests end with this error
    └── MissingDependencyError  an optional package is not installed; also an ImportError

A message says what was given, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SlipstreamError(Exception):
    """Base of all errors raised by Slipstream.

    ``param`` is the field of a request, or the argument, that it is about; None if it is about none
    or several.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """An error is the same in another process, whatever its class is made of."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[SlipstreamError], arguments: tuple[Any, ...], fields: dict[str, Any]
) -> SlipstreamError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error


class CheckpointError(SlipstreamError):
    """A checkpoint cannot be read."""


class BuildError(SlipstreamError):
    """A checkpoint cannot be compiled with these options."""


class EngineMismatchError(SlipstreamError):
    """An engine directory does not fit this version, this machine, or its own hashes."""


class InvalidRequestError(SlipstreamError, ValueError):
    """A request asks for something impossible."""


class ContextLengthError(InvalidRequestError):
    """A prompt is longer than the engine's context.

    ``num_tokens`` may be words, such as "at least 9000". Clients that shorten conversations look
    for "prompt is too long".
    """

    def __init__(self, num_tokens: int | str, max_seq_len: int, *, generates: bool = True) -> None:
        room = " less one token to generate" if generates else ""
        super().__init__(
            f"the prompt has {num_tokens} tokens; this engine takes 1 to {max_seq_len - generates} "
            f"(max_seq_len {max_seq_len}{room}), so the prompt is too long. "
            "Shorten the prompt or load the engine with a larger max_seq_len",
            param="prompt",
        )


class CapacityError(SlipstreamError):
    """A request or a setting needs more memory or pages than there are."""


class ExecutionError(SlipstreamError):
    """A step failed on the device."""


class MissingDependencyError(SlipstreamError, ImportError):
    """An optional package is not installed."""
