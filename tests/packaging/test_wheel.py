"""``make wheel`` of a clean copy, installed where there is no compiler, builds and runs a model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("auditwheel", "build")
NOT_IN_A_CHECKOUT = ("build", "dist", "engines", "*.so", "*.egg-info", ".*", "__pycache__")
pytestmark = [pytest.mark.slow]


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; it must end well. ``environment`` replaces ours."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment or None
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dist/`` of a copy of this checkout."""
    for tool in TOOLS:
        if find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    copy = tmp_path_factory.mktemp("checkout") / "slipstream"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_IN_A_CHECKOUT))
    there = f"{sys.prefix}/test-installed"
    run("make", "-C", copy, "wheel", f"VENV={sys.prefix}", "-o", there, **os.environ)
    return copy / "dist"


def test_one_wheel_for_every_python_and_old_systems(made: Path) -> None:
    sdist, wheel = sorted((f.name for f in made.iterdir()), key=lambda n: n.endswith(".whl"))
    assert wheel.endswith(f"-py3-none-manylinux_2_28_{os.uname().machine}.whl")
    assert sdist.endswith(".tar.gz")


def test_it_runs_where_there_is_no_compiler(
    made: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    bin_ = tmp_path / "venv" / "bin"
    # Where pip looks for packages is the machine's; programs are only those of the environment.
    alone = {k: v for k, v in os.environ.items() if k == "HOME" or k.startswith("PIP_")}
    alone |= {"PATH": str(bin_), "CC": "/no/compiler", "CXX": "/no/compiler"}
    (wheel,) = made.glob("*.whl")
    run(bin_ / "pip", "install", "-q", "--only-binary", ":all:", wheel, **alone)
    engine = tmp_path / "engine"
    run(bin_ / "slipstream", "build", tiny_checkpoint, "-o", engine, **alone)
    words = (engine, "hello", "--max-tokens", "4", "--ignore-eos", "--temperature", "0")
    run(bin_ / "slipstream", "generate", *words, **alone)
    where = "from slipstream.plugins import library; print(library.path(), library.isas())"
    assert str(tmp_path) in run(bin_ / "python", "-c", where, **alone)
