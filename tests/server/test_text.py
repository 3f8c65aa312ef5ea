from __future__ import annotations

import pytest

from slipstream.server.text import format_bytes, format_columns, printable


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (96598464, "92.1 MiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_are_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_columns_align_words_left_and_numbers_right() -> None:
    assert format_columns([("a", 1, "x"), ("long", 200, "")]) == "  a       1  x\n  long  200"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0 狐 é", "model.layers.0 狐 é"),
        ("x\x1b[2J\x9b1m\x07", r"x\x1b[2J\x9b1m\x07"),
        ("a\nerror: b\r", r"a\nerror: b\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert format_columns([(text, 1)]) == f"  {shown}  1"
