"""Processes are those of a Python, also where one is embedded in another program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.errors import ExecutionError
from slipstream.interpreter import interpreter, interpreters


def test_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreter() == sys.executable
    monkeypatch.setenv("PATH", "")
    assert interpreter() == sys.executable


@pytest.mark.parametrize("name", ["", "stub", "python-that-is-gone"])
def test_where_python_is_embedded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Triton's stub, whose own program must not be started once more."""
    (tmp_path / "stub").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "stub").chmod(0o755)
    monkeypatch.setattr(sys, "executable", name and str(tmp_path / name))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    said = subprocess.run([interpreter(), "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == version
    assert len(set(interpreters())) == len([*interpreters()])


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ExecutionError, match="no python3 on PATH"):
        interpreter()
