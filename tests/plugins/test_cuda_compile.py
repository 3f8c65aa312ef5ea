"""Every kernel compiles for the GPUs that we name, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
LEAST_KERNELS, LEAST_FORMS = 25, 60
# Every form of every kernel takes minutes: one architecture where that is no matter, the others
# where the GPU suite runs, which has the cores.
SLOW = 90


def compiled(cache: Path, *arguments: str) -> list[list[str]]:
    """The words of every line that the compiling program prints."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.plugins.cuda_compile", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def check(lines: list[list[str]], architecture: int) -> None:
    """None needs more shared memory than a block may have there."""
    for line in lines:
        assert int(line[1]) <= SHARED_BYTES[architecture], line


def test_every_kernel_compiles(tmp_path: Path) -> None:
    lines = compiled(tmp_path, "90", "first")
    names = {line[0] for line in lines}
    assert len(names) == len(lines) >= LEAST_KERNELS
    assert {"wide_int", "normed_router_kernel", "router_kernel", "expert_gemv_float"} <= names
    assert {"decode_kernel", "hopper_decode_kernel"} <= names
    check(lines, 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [a if a == SLOW else pytest.param(a, marks=pytest.mark.gpu) for a in SHARED_BYTES],
)
def test_every_form_compiles(architecture: int, tmp_path: Path) -> None:
    lines = compiled(tmp_path, str(architecture))
    assert len(lines) >= LEAST_FORMS
    check(lines, architecture)
