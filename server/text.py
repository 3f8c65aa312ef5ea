"""Numbers, tables and answers for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import click

_UNITS = ("KiB", "MiB", "GiB", "TiB")
# C0, DEL and C1: what terminals obey.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]


def format_bytes(count: float) -> str:
    """A size in binary units: ``92.1 MiB``."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), len(_UNITS))
    return f"{count / 1024**power:.1f} {_UNITS[power - 1]}"


def format_count(count: int) -> str:
    """A large number in words: ``30.5 billion``."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,}"


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with everything escaped that a terminal would obey and not show, such as control
    sequences in a name from a file, but for the characters to ``keep``."""
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def format_columns(rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Rows as aligned printable text; the first column is left-aligned, and numbers are
    right-aligned."""
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row, text in zip(rows, texts, strict=True):
        cells = [
            word.rjust(width) if isinstance(value, int | float) else word.ljust(width)
            for value, word, width in zip(row, text, widths, strict=True)
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def without_controls(text: str) -> str:
    """Text of a model with the control characters escaped that a terminal would obey, all but line
    ends and tabs; what has no picture of its own but shapes text, as in emoji, stays."""
    return text.translate(_CONTROLS)


def echo_answer(text: str, *, nl: bool = True) -> None:
    """Print text of a model: on a terminal without control characters, as ``ls`` prints names, into
    a file or a pipe just as it is."""
    click.echo(without_controls(text) if sys.stdout.isatty() else text, nl=nl, color=True)
