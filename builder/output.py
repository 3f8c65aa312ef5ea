"""Where a directory is made: beside its place, whose name it takes when it is whole.

Nothing is deleted that Slipstream did not write, and nothing is left behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slipstream.errors import BuildError

log = logging.getLogger(__name__)

_MAKING = ".{}.making"
_LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Of renameat(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(
    output: Path, what: str, contents: Callable[[Path], Collection[str] | None], *sources: Path
) -> None:
    """BuildError unless a directory can be made at ``output``, replacing nothing but one like it.

    ``what`` is the kind of thing that is made, such as ``engine``. ``contents`` has the names of
    what makes up the one that stands in a directory, None if there is none. ``sources`` are what it
    is made from.
    """
    place = output.resolve()
    if output.is_symlink():
        raise BuildError(f"{output} is a symbolic link; choose another -o, or pass {place} itself")
    if output.name in ("", "..") or place == Path.cwd():
        raise BuildError(
            f"{output} is the current directory or one above it, which cannot be replaced; choose "
            f"another -o, such as {output / 'new'}"
        )
    for source in sources:
        if place in (source.resolve(), *source.resolve().parents):
            raise BuildError(f"{output} is or holds the checkpoint {source}; choose another -o")
    _check_parent(output)
    if output.exists():
        _check_replaceable(output, what, contents)


def _check_parent(output: Path) -> None:
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "may not be written" if parent.is_dir() else "is no directory"
        raise BuildError(f"cannot write {output}: {parent} {why}; choose another -o")


def _check_replaceable(
    output: Path, what: str, contents: Callable[[Path], Collection[str] | None]
) -> None:
    if not output.is_dir():
        raise BuildError(f"{output} exists and is no directory; choose another -o or remove it")
    if os.path.ismount(output):
        raise BuildError(
            f"{output} is a mount point, which cannot be replaced; choose another -o, such as "
            f"{output / 'new'}"
        )
    found = {file.name for file in output.iterdir()}
    ours = contents(output) if found else ()
    if ours is None:
        raise BuildError(f"{output} exists and is no {what}; choose another -o or remove it")
    if others := sorted(found - set(ours)):
        raise BuildError(
            f"{output} holds {len(others)} files that are not part of its {what}, such as "
            f"{others[0]}, and would be deleted with it; move them or choose another -o"
        )


@contextmanager
def scratch(output: Path, *, wait: bool = False) -> Iterator[Path]:
    """An empty directory beside ``output`` to make it in, gone when the block ends.

    What a process that was killed has left there is removed. Another process that is making the
    same is waited for, or else BuildError. OSError for what cannot be written.
    """
    root = output.with_name(_MAKING.format(output.name))
    with locked(root, wait=wait):
        try:
            clear(root)
            made = root / output.name
            made.mkdir()
            yield made
        finally:
            remove(root)


def discard(output: Path) -> None:
    """Remove a directory, in one step for all who look at it, with what killed processes have left
    beside it. BuildError while another is making it."""
    with scratch(output) as made:
        if output.exists():
            os.rename(output, made)


def unfinished(directory: Path) -> list[Path]:
    """The outputs in a directory that are being made, or whose making was cut short."""
    found = directory.glob(_MAKING.format("*")) if directory.is_dir() else ()
    start, end = _MAKING.split("{}")
    return [file.with_name(file.name.removeprefix(start).removesuffix(end)) for file in found]


@contextmanager
def locked(root: Path, *, wait: bool = False) -> Iterator[None]:
    """Makes a directory and keeps other processes out of it until the block ends."""
    descriptor = _acquire(root, wait)
    try:
        yield
    finally:
        os.close(descriptor)


def clear(root: Path) -> None:
    """Empty a locked directory."""
    for child in root.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != _LOCK:
            child.unlink()


def remove(root: Path) -> None:
    """Remove a locked directory; whoever waits for it makes it anew."""
    clear(root)
    (root / _LOCK).unlink()
    with suppress(OSError):  # it has been taken again
        root.rmdir()


def publish(made: Path, output: Path) -> None:
    """Give a finished directory its name, in one step; what stood there is then at ``made``."""
    if not output.exists():
        os.rename(made, output)
    elif not _exchange(made, output):
        aside = made.with_name(f"{made.name}.old")
        os.rename(output, aside)
        try:
            os.rename(made, output)
        except OSError:
            os.rename(aside, output)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = ctypes.c_char_p(os.fsencode(one)), ctypes.c_char_p(os.fsencode(other))
    failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return not failed


def _acquire(root: Path, wait: bool) -> int:
    """A descriptor that holds the lock of a directory which is still in its place."""
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(root / _LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # removed since, by who has ended
            continue
        try:
            _lock(descriptor, root, wait)
            if _is_at(descriptor, root / _LOCK):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, root: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            raise BuildError(
                f"another run is writing into {root}; wait for it to end or choose another -o"
            ) from error
        log.warning("another process is writing into %s; waiting for it to end", root)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some file systems of clusters
            raise


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
