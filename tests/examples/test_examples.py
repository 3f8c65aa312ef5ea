"""The examples and the README's Python run as they stand, on a tiny engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("quickstart.py", "The capital of France is →"),
        ("async_requests.py", "request 3: 40 tokens"),
    ],
)
def test_example(example: str, expected: str, tiny_engine: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / example), str(tiny_engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_readme_python(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"engines/smollm2"' in code
    exec(code.replace('"engines/smollm2"', repr(str(tiny_engine))), {})
    assert "The capital of France is →" in capsys.readouterr().out
