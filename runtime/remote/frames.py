"""Messages on a stream of bytes: each is preceded by its length."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
MOST_BYTES = (1 << 32) - 1


def frame(message: bytes) -> bytes:
    """A message as it is sent; of at most ``MOST_BYTES``."""
    return _LENGTH.pack(len(message)) + message


class FrameReader:
    """Finds the messages in bytes that come in pieces of any size."""

    __slots__ = ("_held", "_needed")

    def __init__(self) -> None:
        self._held = bytearray()
        self._needed = _LENGTH.size  # bytes until something can be told

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """Take the next bytes; yields messages that are complete, each to be read before the
        next."""
        held = self._held
        held += data
        if len(held) < self._needed:
            return
        begin, end = 0, len(held)
        with memoryview(held) as view:
            while end - begin >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, begin)
                stop = begin + _LENGTH.size + length
                if stop > end:
                    break
                with view[begin + _LENGTH.size : stop] as message:
                    yield message
                begin = stop
        del held[:begin]
        self._needed = _LENGTH.size
        if len(held) >= _LENGTH.size:
            self._needed += _LENGTH.unpack_from(held)[0]
