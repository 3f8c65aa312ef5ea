"""The container of a GGUF file, with counts, types and lengths that no model has."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from slipstream.builder.checkpoints.gguf.file import read_gguf
from slipstream.errors import CheckpointError

UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(kind: int, value: bytes, name: bytes = b"a") -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return pair(ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(axes: int, sizes: bytes, kind: int = 0, name: bytes = b"t", offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", axes) + sizes + struct.pack("<IQ", kind, offset)


def write(path: Path, metadata: bytes, pairs: int = 1, tensors: int = 0, size: int = 0) -> Path:
    """A file of these bytes, with zeros up to ``size`` that take no room."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + metadata)
        file.truncate(max(file.tell(), size))
    return path


NESTED = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(100_000))
LARGE = 3 << 30
HOSTILE = {
    "a number of pairs": (b"", 2**63, 0),
    "a number of tensors": (pair(UINT8, b"\1"), 1, 2**63),
    "a few tensors too many": (pair(UINT8, b"\1"), 1, 40_000),
    "a list of numbers": (array(UINT8, 2**40), 1, 0),
    "a list of numbers that wraps around": (array(UINT64, 2**61), 1, 0),
    "a list of more numbers than any": (array(UINT32, 2**21 + 1), 1, 0),
    "a list of empty texts": (array(STRING, 2**28), 1, 0),
    "a list of lists": (array(ARRAY, 2**28), 1, 0),
    "lists in lists": (pair(ARRAY, NESTED), 1, 0),
    "a list of an unknown type": (array(77, 3), 1, 0),
    "an unknown type": (pair(4711, b""), 1, 0),
    "a text": (pair(STRING, struct.pack("<Q", 2**31)), 1, 0),
    "a text that wraps around": (pair(STRING, struct.pack("<Q", 2**64 - 8)), 1, 0),
    "a name": (struct.pack("<Q", 2**31), 1, 0),
    "a text that is no UTF-8": (pair(STRING, text(b"\xff")), 1, 0),
    "a name twice": (pair(UINT8, b"\1") * 2, 2, 0),
    "an alignment of 0": (pair(UINT32, bytes(4), b"general.alignment"), 1, 0),
    "an alignment that is a text": (pair(STRING, text(b"32"), b"general.alignment"), 1, 0),
    "the axes of a tensor": (tensor(2**32 - 1, b""), 0, 1),
    "the sizes of a tensor": (tensor(2, struct.pack("<QQ", 2**40, 2**40)), 0, 1),
    "sizes that wrap around": (tensor(2, struct.pack("<QQ", 2**33, 2**33)), 0, 1),
    "the place of a tensor": (tensor(1, struct.pack("<Q", 4), offset=2**63), 0, 1),
    "the type of a tensor": (tensor(1, struct.pack("<Q", 4), kind=4711), 0, 1),
    "the name of a tensor": (tensor(1, struct.pack("<Q", 4), name=b"x" * 1_000_000), 0, 1),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("size", [0, LARGE], ids=["short", "sparse"])
def test_what_a_file_says_of_itself_is_bounded(tmp_path: Path, what: str, size: int) -> None:
    """Also where zeros follow, of which all that is said could be made."""
    metadata, pairs, tensors = HOSTILE[what]
    path = write(tmp_path / "m.gguf", metadata, pairs, tensors, size)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"m\.gguf .*download it again") as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


def test_lists_and_texts_are_python_values(tmp_path: Path) -> None:
    metadata = (
        array(UINT32, 3, struct.pack("<III", 1, 2, 2**32 - 1))
        + pair(STRING, text("größe".encode()), b"b")
        + pair(ARRAY, struct.pack("<IQ", STRING, 2) + text(b"") + text(b"x"), b"c")
        + pair(UINT64, struct.pack("<Q", 2**64 - 1), b"d")
    )
    file = read_gguf(write(tmp_path / "m.gguf", metadata, 4, size=1 << 10))
    assert file.metadata == {"a": [1, 2, 2**32 - 1], "b": "größe", "c": ["", "x"], "d": 2**64 - 1}
