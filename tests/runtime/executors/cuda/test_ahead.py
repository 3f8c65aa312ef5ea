"""What torch is made of is loaded before it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, threading
from pathlib import Path
from types import SimpleNamespace
from slipstream.runtime.executors.cuda import ahead

def started():
    return [t for t in threading.enumerate() if t.name == "slipstream-ahead"]

engine = SimpleNamespace(path=Path(sys.argv[1]))
calls = []
ahead._make_context = lambda: calls.append("context")
ahead._read_ahead = lambda file: calls.append(file.name)
ahead.begin(engine)
ahead.begin(engine)
for thread in started():
    thread.join()
imported = "torch" in sys.modules
maps = Path("/proc/self/maps").read_text()
import torch
assert torch.ones(2).sum() == 2
ahead.begin(SimpleNamespace(path=Path(sys.argv[1], "other")))
for thread in started():
    thread.join()
print(json.dumps([imported, "libtorch_cpu" in maps, sorted(calls)]))
"""


def run(directory: Path, **environment: str) -> list[object]:
    command = [sys.executable, "-c", SCRIPT, str(directory)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[object] = json.loads(done.stdout)
    return found


def test_libraries_are_loaded_and_the_context_made_once(tmp_path: Path) -> None:
    weights = "weights.safetensors"
    assert run(tmp_path, TRITON_INTERPRET="0") == [False, True, ["context", weights, weights]]


def test_kernels_that_are_interpreted_need_no_context(tmp_path: Path) -> None:
    weights = "weights.safetensors"
    assert run(tmp_path, TRITON_INTERPRET="1") == [False, True, [weights, weights]]


def test_a_machine_without_a_gpu_or_the_file_does_without(tmp_path: Path) -> None:
    from slipstream.runtime.executors.cuda.ahead import _make_context, _read_ahead

    _make_context()
    _read_ahead(tmp_path / "nothing")
    (tmp_path / "weights").write_bytes(b"0" * 100)
    _read_ahead(tmp_path / "weights")
