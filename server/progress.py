"""Progress bars on stderr, for terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


class Report(Protocol):
    """Is told how much is done, of how much in all (None: not known yet)."""

    def __call__(self, done: int, total: int | None) -> None: ...


@contextmanager
def byte_progress(label: str) -> Iterator[Report]:
    """A bar in bytes that appears on the first report; nothing when stderr is no terminal."""
    with _progress(label, in_bytes=True) as report:
        yield report


@contextmanager
def item_progress(label: str) -> Iterator[Report]:
    """A bar in items; nothing when stderr is no terminal."""
    with _progress(label, in_bytes=False) as report:
        yield report


@contextmanager
def _progress(label: str, *, in_bytes: bool) -> Iterator[Report]:
    if not sys.stderr.isatty():
        yield _ignore
        return
    bar = _bar(in_bytes)
    task = bar.add_task(label, total=None)

    def report(done: int, total: int | None) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


def _ignore(done: int, total: int | None) -> None:
    """Nobody watches."""


def _bar(in_bytes: bool) -> Progress:
    # Imported here because rich is slow to import and most commands show no bar.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    measures: list[ProgressColumn] = [MofNCompleteColumn()]
    if in_bytes:
        measures = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *measures, TimeRemainingColumn()]
    return Progress(*columns, console=Console(stderr=True), transient=True)
