"""Every kernel compiles for the GPUs that we name, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
LEAST_KERNELS = 30


# One everywhere, the others where the GPU suite runs, which has the cores.
EVERYWHERE = (90,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [a if a in EVERYWHERE else pytest.param(a, marks=pytest.mark.gpu) for a in SHARED_BYTES],
)
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    """And needs no more shared memory than a block may have there."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.plugins.cuda_compile", str(architecture)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= LEAST_KERNELS
    for line in lines:
        assert int(line.split()[1]) <= SHARED_BYTES[architecture], line
