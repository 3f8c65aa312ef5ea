"""Files of the rooms that are no Python belong to the package, too."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("weights", "plugins", "builder", "quantize", "runtime", "server")
MADE = {".so", ".pyc"}


def test_every_file_of_the_rooms_is_shipped() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["*"]
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.*") if file.is_file()]
    shipped = [file for file in files if file.suffix not in {".py", *MADE}]
    assert len(shipped) > 40
    for file in shipped:
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), file
