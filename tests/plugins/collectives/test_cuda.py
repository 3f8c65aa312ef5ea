"""The GPU's kernels between ranks: in Triton's interpreter, a process a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.plugins.collectives.cuda_rank import SHAPES, layout_of

ROOT = Path(__file__).parents[3]
SECONDS = 300  # for ranks that wait for each other for ever


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_the_reference(ranks: int, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(ranks * layout_of(ranks).bytes))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.plugins.collectives.cuda_rank", memory, *map(str, who)],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in ((rank, ranks) for rank in range(ranks))
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, err[-3000:]
            assert len(out.splitlines()) == len(SHAPES)
    finally:
        for process in processes:
            process.kill()
