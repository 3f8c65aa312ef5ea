"""A mapped file of KV pages that survives the process which wrote it, whatever ends that."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.runtime.engine.host_pages import Record

_MAGIC = b"slipstream-kv-01"
_HEADER = struct.Struct("<16s32sQQ")  # magic, engine, slots, bytes of a slot; then a checksum
_BLOCK = mmap.PAGESIZE
# Of each slot what it holds, when that was noted (0: it holds nothing), and a checksum of all.
_ENTRY = np.dtype(
    [("digest", "V32"), ("parent", "V32"), ("noted", "<u8"), ("windows", "<u4"), ("sum", "<u4")]
)


class HostFile:
    """The slots of a file, ``data [slots, bytes]``, and a ``Journal`` of what they hold.

    header | entries | slots, each at the start of a block. An entry is cleared before its slot is
    written and noted after, so a process may end at any time. A machine may not: what it has not
    written back differs from its checksum, which is computed before a page is first read.
    """

    def __init__(self, path: Path, count: int, slot_bytes: int, fingerprint: str) -> None:
        """Open or make the file. EngineMismatchError where there is another: of another engine or
        size, cut off, no such file at all, or one in use; CapacityError where there is no room, or
        no file can be."""
        self._path = path
        entries = -(-count * _ENTRY.itemsize // _BLOCK) * _BLOCK
        size = _BLOCK + entries + count * slot_bytes
        if size > sys.maxsize:
            raise _no_room(path, size, "no file is so large")
        header = _HEADER.pack(_MAGIC, fingerprint.encode()[:32].ljust(32, b"\0"), count, slot_bytes)
        header += _checksum(header)
        self._handle = _open(path, header, size)
        try:
            self._lock()
            self._check(header, size)
            memory = mmap.mmap(self._handle.fileno(), size)
        except BaseException:
            self._handle.close()
            raise
        whole = np.frombuffer(memory, np.uint8)
        self._entries = whole[_BLOCK : _BLOCK + count * _ENTRY.itemsize].view(_ENTRY)
        self.data: NDArray[np.uint8] = whole[_BLOCK + entries :].reshape(count, slot_bytes)
        self._clock = int(self._entries["noted"].max(initial=0))

    def found(self) -> Sequence[Record]:
        """What slots held when the file was opened, least recently stored first."""
        noted = self._entries["noted"]
        slots = [int(slot) for slot in np.argsort(noted, kind="stable") if noted[slot]]
        return [
            Record(slot, bytes(entry["digest"]), bytes(entry["parent"]), int(entry["windows"]))
            for slot in slots
            for entry in (self._entries[slot],)
        ]

    def note(self, record: Record) -> None:
        """A slot holds this, all of it."""
        entry = self._entries[record.slot]
        self._clock += 1
        entry["digest"], entry["parent"] = np.void(record.digest), np.void(record.parent)
        entry["windows"] = record.windows
        entry["sum"] = self._sum(record)
        entry["noted"] = self._clock

    def erase(self, slot: int) -> None:
        """A slot holds nothing, and is about to be written."""
        self._entries[slot]["noted"] = 0

    def is_intact(self, slot: int) -> bool:
        """Whether a slot holds what was noted."""
        entry = self._entries[slot]
        digest, parent = bytes(entry["digest"]), bytes(entry["parent"])
        return int(entry["sum"]) == self._sum(Record(slot, digest, parent, int(entry["windows"])))

    def close(self) -> None:
        """Let another process have the file. What is mapped, a descriptor with it, goes with the
        last view of it, so the lock is given back here."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        self._handle.close()

    def _sum(self, record: Record) -> int:
        told = record.digest + record.parent.ljust(32, b"\0") + struct.pack("<I", record.windows)
        return zlib.crc32(self.data[record.slot], zlib.crc32(told))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EngineMismatchError(
                f"kv_offload_path {self._path} is in use by another engine; give each its own"
            ) from error

    def _check(self, header: bytes, size: int) -> None:
        """Compare the header and the size of a file that is there with those that are wanted."""
        found, actual = self._handle.read(len(header)), os.fstat(self._handle.fileno()).st_size
        body = found[: _HEADER.size]
        whole = len(found) == len(header) and found[_HEADER.size :] == _checksum(body)
        if not whole or not body.startswith(_MAGIC):
            raise self._refusal("is no file of KV pages")
        _, engine, count, slot_bytes = _HEADER.unpack(body)
        if engine != header[16:48]:
            raise self._refusal(f"holds pages of another engine ({_text(engine)})")
        if found != header:
            raise self._refusal(f"has {count} slots of {slot_bytes} bytes, other than asked for")
        if actual != size:
            raise self._refusal(f"has {actual} bytes, not {size}: it was cut off")

    def _refusal(self, reason: str) -> EngineMismatchError:
        return EngineMismatchError(
            f"kv_offload_path {self._path} {reason}; give another file, or delete it: all that it"
            " holds can be computed again"
        )


def _checksum(body: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(body))


def _text(engine: bytes) -> str:
    return engine.rstrip(b"\0").decode("ascii", "replace")


def _open(path: Path, header: bytes, size: int) -> BinaryIO:
    """The file, made if it is not there."""
    try:
        if not path.exists():
            _make(path, header, size)
        return path.open("r+b")
    except OSError as error:
        raise _no_room(path, size, error) from error


def _no_room(path: Path, size: int, reason: object) -> CapacityError:
    return CapacityError(
        f"kv_offload_path {path} of {size} bytes cannot be made or opened ({reason}): lower"
        " --kv-offload-gib, or give a file where there is room"
    )


def _make(path: Path, header: bytes, size: int) -> None:
    """Make a file that others see only whole, with all the room it takes, and that nobody else may
    read: what was asked can be told from its pages."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(new, "w+b", opener=_own) as handle:
            os.posix_fallocate(handle.fileno(), 0, size)
            handle.write(header)
        new.rename(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


def _own(path: str, flags: int) -> int:
    """Open a file that is its owner's alone."""
    return os.open(path, flags, 0o600)
