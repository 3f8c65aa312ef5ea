"""Pages in files of a directory that both processes see: shared memory of one host."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.handover import label as labels
from slipstream.runtime.handover.staging import Staging
from slipstream.runtime.handover.transport import LostHandover

_NAME = re.compile(r"[0-9a-f]{32}")
_TOLD = "transfer_id"
_THREADS = 4  # that read one prompt; more than one are slower at writing a new file
_SHARE = 16 << 20  # bytes that are worth a thread
_PART = re.compile(r"[0-9a-f]{32}\.part")


class FileTransport:
    """The ``Transport`` of one host: a file an offer, whole before it has its name, and gone when
    it was taken.

    The directory is this user's alone, and files are only ever opened in it, by names that are
    numbers: what a peer says reaches nothing else. A file's time of modification is when it
    expires, so any worker frees what another one has left behind that was killed.
    """

    def __init__(self, root: Path, staging: Staging, timeout: float) -> None:
        """Raises ``InvalidRequestError`` for a ``root`` where there can be no such directory.
        Offers are free after ``timeout`` seconds."""
        self._staging = staging
        self._timeout = timeout
        self._directory = _open_own(root / f"slipstream-{os.geteuid()}")
        self._threads = ThreadPoolExecutor(_THREADS, "slipstream-pages")

    def offer(self, name: str, label: bytes, slots: Sequence[int]) -> Mapping[str, Any]:
        """Write a file, and then give it its name, which is all that a peer is told."""
        part = f"{_checked(name)}.part"
        try:
            with self._opened(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(label)
                    for row in self._staging.rows(slots):
                        file.write(row.data)
                os.utime(descriptor, (time.time(), time.time() + self._timeout))
            os.rename(part, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            self._remove(part)
            raise LostHandover("room") from error
        return {_TOLD: name}

    def take(self, told: Mapping[str, Any], label: bytes, slots: Sequence[int]) -> None:
        """Read a file, and remove it."""
        name = _checked(told.get(_TOLD))
        size = labels.SIZE + len(slots) * self._staging.slot_bytes
        try:
            with self._opened(name, os.O_RDONLY) as descriptor:
                labels.check_label(os.pread(descriptor, labels.SIZE, 0), label)
                if os.fstat(descriptor).st_size != size:
                    raise LostHandover("engine")
                self._read(descriptor, slots)
        except OSError as error:
            raise LostHandover("missing") from error
        self._remove(name)

    def withdraw(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._remove(_checked(name))

    def is_open(self, name: str) -> bool:
        """Whether the file is there."""
        with suppress(OSError):
            os.stat(_checked(name), dir_fd=self._directory, follow_symlinks=False)
            return True
        return False

    def sweep(self) -> int:
        """Remove files that have expired."""
        now, removed = time.time(), 0
        for name in self._names():
            with suppress(OSError):
                expires = os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_mtime
                # One that is still written was modified when it was written to last.
                grace = self._timeout if _PART.fullmatch(name) else 0.0
                if now > expires + grace:
                    os.unlink(name, dir_fd=self._directory)
                    removed += 1
        return removed

    def close(self) -> None:
        """Close the directory, when all copies have ended."""
        self._threads.shutdown()
        descriptor, self._directory = self._directory, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _names(self) -> Iterator[str]:
        for name in os.listdir(self._directory):
            if _NAME.fullmatch(name) or _PART.fullmatch(name):
                yield name

    @contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._directory)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, slots: Sequence[int]) -> None:
        """Fill slots from a file, by several threads."""
        size = self._staging.slot_bytes
        count = max(1, _SHARE // size, -(-len(slots) // _THREADS))
        parts = [slots[first : first + count] for first in range(0, len(slots), count)]
        starts = [labels.SIZE + size * count * number for number in range(len(parts))]
        rows = [[row.data for row in self._staging.rows(part)] for part in parts]
        for _ in self._threads.map(partial(_fill, descriptor), starts, rows):
            pass

    def _remove(self, name: str) -> None:
        with suppress(OSError):  # it is gone, or goes when it has expired
            os.unlink(name, dir_fd=self._directory)


def _fill(descriptor: int, start: int, rows: list[memoryview]) -> None:
    for row in rows:
        while row:
            count = os.preadv(descriptor, [row], start)
            if not count:
                raise LostHandover("engine")  # it was cut off
            start, row = start + count, row[count:]


def _checked(name: object) -> str:
    """The name of a file; raises ``LostHandover`` for what is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LostHandover("missing")
    return name


def _open_own(path: Path) -> int:
    """A directory that only this user may enter, made if it is not there."""
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(path, str(error)) from error
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(descriptor)
        raise _unusable(path, "others than this user may enter it")
    return descriptor


def _unusable(path: Path, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"pages cannot be handed over in {path} ({reason}); give another kv_transfer_path, which"
        " all workers of this host see, or remove that directory",
        param="kv_transfer_path",
    )
