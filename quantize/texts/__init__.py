"""The texts that come with this package; README.md beside this file tells their origin."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Literal

Purpose = Literal["calibration", "evaluation"]


def load(purpose: Purpose) -> Mapping[str, str]:
    """Content by file name, one kind of text a file: prose, languages, code, conversations.

    The two purposes share nothing. ``.txt`` is text, ``.jsonl`` has an object with ``messages``
    on every line.
    """
    found = (file for file in files(__name__).iterdir() if file.name.startswith(f"{purpose}_"))
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted(found, key=lambda file: file.name)
        if file.name.endswith((".txt", ".jsonl"))
    }
