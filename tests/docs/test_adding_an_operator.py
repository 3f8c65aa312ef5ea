"""The operator of ``docs/adding_an_operator.md``: compiled as a package of its own, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_an_operator.md"
BLOCK = re.compile(r"^```(?:python|cpp)\n(?:#|//) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Every instruction set, and a session that knows both libraries.
USE = """
import numpy as np
import onnx
import onnxruntime as ort
from squash.reference import squash

from slipstream.plugins import library, native
from slipstream.plugins.operators import OPERATORS

modules = library.modules(["Linear", "Squash", "RotaryAngles"])
assert modules == ("slipstream.plugins._cpu", "squash._cpu"), modules
x = np.linspace(-9, 9, 12, dtype=np.float32).reshape(3, 4)
want = squash(x, 2.0)
for isa in library.isas("squash._cpu"):
    (y,) = native.call(OPERATORS["Squash"], {"x": x, "cap": 2}, isa)
    np.testing.assert_allclose(y, want, rtol=1e-6)


def run(cap):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for module in modules:
        options.register_custom_ops_library(library.path(module))
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, 1, ["a", "b"]) for name in "xy"]
    node = helper.make_node("Squash", ["x"], ["y"], domain="squash", cap=cap)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("squash", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


for cap in (2, 2.0):
    np.testing.assert_allclose(run(cap), want, rtol=1e-6)
for cap, message in ((-2.0, "cap must be positive"), ("2", "cap is not of type float")):
    try:
        run(cap)
    except Exception as error:
        assert "squash.Squash: " in str(error) and message in str(error), error
    else:
        raise AssertionError(f"a cap of {cap!r} was taken")
"""
ON_CUDA = """
import numpy as np
import onnx_ir as ir
import torch
from squash.reference import squash
from tests.plugins.interpreter import repair

from slipstream.plugins.cuda.binding import Context, Run, bind
from slipstream.plugins.linear.cuda.tactics import Tactics

repair()
x = torch.linspace(-9, 9, 12).reshape(3, 4)
value = ir.Value(name="x")
node = ir.node("Squash", [value], {"cap": 2}, domain="squash", name="cap")
(y,) = bind(node, Context({}, Tactics((9, 0), "")))(Run({"x": x}, pdl=False))
np.testing.assert_allclose(y.numpy(), squash(x.numpy(), 2.0), rtol=1e-5)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, built in place, beside what an installer writes of the entry points."""
    folder = tmp_path_factory.mktemp("package")
    for name, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    run(folder, "setup.py", "-q", "egg_info", "build_ext", "--inplace")
    return folder


def test_it_runs_on_a_cpu(package: Path) -> None:
    run(package, "-c", USE)


@pytest.mark.kernel
def test_it_runs_on_a_gpu(package: Path) -> None:
    run(package, "-c", ON_CUDA, TRITON_INTERPRET="1")


def run(folder: Path, *arguments: str, **environment: str) -> None:
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT, folder)))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
