"""The GPU's kernels between ranks, a process each: on GPUs, or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.plugins.collectives.cuda_ranks import SHAPES

from slipstream.plugins.cuda.launch import interpreting

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[3]
SECONDS = 300  # for ranks that wait for each other for ever
GPUS = 8 if interpreting() else torch.cuda.device_count()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_the_reference(ranks: int) -> None:
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.collectives.cuda_ranks", str(ranks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rank") == ranks * len(SHAPES)
