"""What is said where the plans of an engine cannot run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tensorrt_segments import VERSION, without_tensorrt
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.build import build
from slipstream.builder.engine import Engine, open_engine
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.tensorrt import plans
from slipstream.errors import BuildError, EngineMismatchError, MissingDependencyError
from slipstream.runtime.executors import check_device
from slipstream.runtime.executors.cuda import device
from slipstream.runtime.executors.tensorrt import require as tensorrt_require


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    without_tensorrt(monkeypatch)
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    build(checkpoint, tmp_path / "engine", BuildOptions(target="tensorrt"))
    return open_engine(tmp_path / "engine")


def installed(monkeypatch: pytest.MonkeyPatch, *flavours: str, version: str = VERSION) -> None:
    """Let these packages of TensorRT be here, and a GPU of sm_90."""
    module = SimpleNamespace(__version__=version)
    for name, value in {
        "module_of": lambda flavour: flavour if flavour in flavours else None,
        "import_flavour": lambda _: module,
    }.items():
        monkeypatch.setattr(tensorrt_require, name, value)
    monkeypatch.setattr(device, "require", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")


@pytest.mark.parametrize(
    ("flavours", "version", "kind", "message"),
    [
        ((), VERSION, MissingDependencyError, r"tensorrt_rtx 1\.7.*not installed.*pip install"),
        (("tensorrt",), VERSION, EngineMismatchError, r"tensorrt is installed, which does not"),
        (("tensorrt_rtx",), "2.0", EngineMismatchError, r"2\.0 is installed.*--target tensorrt"),
        (("tensorrt_rtx",), VERSION, EngineMismatchError, r"for sm_89, sm_120.*sm_90.*target cuda"),
    ],
)
def test_what_is_missing_or_does_not_fit(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    flavours: tuple[str, ...],
    version: str,
    kind: type[Exception],
    message: str,
) -> None:
    installed(monkeypatch, *flavours, version=version)
    with pytest.raises(kind, match=message):
        check_device(engine)


def test_libraries_that_do_not_load(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "tensorrt_rtx")

    def broken(_: str) -> Any:  # noqa: ANN401
        raise OSError("libtensorrt_rtx.so.1: not found")

    monkeypatch.setattr(tensorrt_require, "import_flavour", broken)
    with pytest.raises(EngineMismatchError, match=r"do not load here \(libtensorrt_rtx"):
        check_device(engine)


def test_all_that_fits_is_let_through(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    check_device(engine)


@pytest.mark.parametrize(
    ("flavours", "gpu", "found"),
    [
        (("tensorrt_rtx",), None, "tensorrt_rtx"),
        (("tensorrt_rtx",), (8, 9), "tensorrt_rtx"),
        (("tensorrt_rtx", "tensorrt"), None, "tensorrt_rtx"),
        (("tensorrt_rtx", "tensorrt"), (9, 0), "tensorrt"),
    ],
)
def test_which_flavour_makes_plans(
    monkeypatch: pytest.MonkeyPatch,
    flavours: tuple[str, ...],
    gpu: tuple[int, int] | None,
    found: str,
) -> None:
    monkeypatch.setattr(plans, "module_of", lambda name: name if name in flavours else None)
    monkeypatch.setattr(plans, "gpu_capability", lambda: gpu)
    assert plans.flavour_here() == found


def test_nothing_here_makes_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "gpu_capability", lambda: None)
    monkeypatch.setattr(plans, "module_of", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'slipstream\[tensorrt\]'"):
        plans.flavour_here()
    monkeypatch.setattr(plans, "module_of", lambda name: name if name == "tensorrt" else None)
    with pytest.raises(BuildError, match="only for a GPU that is there"):
        plans.flavour_here()
