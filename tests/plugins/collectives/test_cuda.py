"""The GPU's kernels between ranks: in Triton's interpreter, a process a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.plugins.collectives.cuda_ranks import SHAPES

ROOT = Path(__file__).parents[3]
SECONDS = 300  # for ranks that wait for each other for ever


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_the_reference(ranks: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.collectives.cuda_ranks", str(ranks)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rank") == ranks * len(SHAPES)
