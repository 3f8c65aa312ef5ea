"""The examples and the README's Python run as they stand, on a tiny engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.builder.build import plan
from slipstream.builder.options import BuildOptions

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


def test_a_trained_head_is_one_that_a_build_takes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    head, script = tmp_path / "head", ROOT / "examples" / "train_eagle3_head.py"
    sizes = ["--minutes", "0.02", "--windows", "8", "--length", "48", "--vocabulary", "64"]
    command = [sys.executable, str(script), str(tiny_checkpoint), str(head), *sizes]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    planned = plan(tiny_checkpoint, BuildOptions(target="cpu", speculative_model=str(head)))
    assert planned.head is not None and planned.head.vocab_size == 64


def test_readme_python(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"engines/smollm2"' in code
    exec(code.replace('"engines/smollm2"', repr(str(tiny_engine))), {})
    assert "The capital of France is →" in capsys.readouterr().out
