"""Numbers and tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """A size in binary units: ``92.1 MiB``."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), len(_UNITS))
    return f"{count / 1024**power:.1f} {_UNITS[power - 1]}"


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
