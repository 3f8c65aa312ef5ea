"""Messages are the same however their bytes come."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.runtime.remote.frames import FrameReader, frame

MESSAGES = st.lists(st.binary(max_size=40), max_size=8)


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.lists(st.integers(0, 400), max_size=12))
def test_messages_come_whole_and_in_order_however_bytes_are_cut(
    messages: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(map(frame, messages))
    reader, found, begin = FrameReader(), [], 0
    for cut in [*sorted(min(c, len(data)) for c in cuts), len(data)]:
        found += [bytes(message) for message in reader.feed(data[begin:cut])]
        begin = cut
        whole = _complete(messages, cut)
        assert found == messages[:whole], "a message is told as soon as it is there"


def _complete(messages: list[bytes], length: int) -> int:
    """How many of the messages are there in so many bytes."""
    count = end = 0
    for message in messages:
        end += len(frame(message))
        count += end <= length
    return count


def test_a_large_message_in_small_pieces() -> None:
    message = bytes(range(256)) * 4096
    data, reader = frame(message) + frame(b"next"), FrameReader()
    pieces = (data[i : i + 65536] for i in range(0, len(data), 65536))
    assert [bytes(m) for piece in pieces for m in reader.feed(piece)] == [message, b"next"]
