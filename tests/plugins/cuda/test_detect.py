"""``--target auto`` tries the GPU that it chooses; the driver and Python are stood in for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream.builder.targets import base
from slipstream.builder.targets.base import check_runs_here, create_target
from slipstream.errors import BuildError
from slipstream.plugins.cuda import detect


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for function in (detect.gpu_capability, detect.gpu_works):
        function.cache_clear()
    yield
    for function in (detect.gpu_capability, detect.gpu_works):
        function.cache_clear()


class Driver:
    """libcuda with one GPU of a compute capability, or none."""

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self._capability = capability

    def cuInit(self, flags: int) -> int:
        return 0 if self._capability else 100

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: ANN401
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: object) -> int:  # noqa: ANN401
        assert self._capability is not None
        value._obj.value = self._capability[attribute - 75]
        return 0


def machine(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, trial: str = "pass"
) -> None:
    """A GPU, and what happens where torch tries it."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(capability))
    monkeypatch.setattr(detect, "find_spec", lambda name: name)
    monkeypatch.setattr(detect, "_TRIAL", trial)


def test_without_a_gpu_nothing_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, None)
    monkeypatch.setattr(subprocess, "run", None)
    assert create_target("auto").name == "cpu" and not caplog.messages


def test_a_gpu_that_works_is_chosen_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    machine(monkeypatch, (9, 0), f"open({str(tmp_path / 'tried')!r}, 'a').write('x')")
    assert [create_target("auto").name for _ in range(2)] == ["cuda", "cuda"]
    assert (tmp_path / "tried").read_text() == "x" and not caplog.messages


@pytest.mark.parametrize(
    ("capability", "trial", "reason"),
    [
        ((7, 5), "pass", "it is sm_75, and the kernels need sm_80 or newer"),
        (
            (9, 0),
            "assert False, 'Torch not compiled with CUDA enabled'",
            "torch cannot use it (AssertionError: Torch not compiled with CUDA enabled); install",
        ),
        ((9, 0), "import no_such_torch", "torch cannot use it (ModuleNotFoundError"),
        ((9, 0), "import time; time.sleep(60)", "trying it failed"),
    ],
)
def test_a_gpu_that_does_not_work_is_left_alone_and_why_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    trial: str,
    reason: str,
) -> None:
    machine(monkeypatch, capability, trial)
    if "sleep" in trial:
        monkeypatch.setattr(detect, "_TRIAL_SECONDS", 0.2)
    assert [create_target("auto").name for _ in range(2)] == ["cpu", "cpu"]
    (message,) = caplog.messages
    assert message.startswith("the GPU of this machine is not used: ") and reason in message
    assert create_target("cuda").name == "cuda"  # for another machine


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, (9, 0))
    monkeypatch.setattr(detect, "find_spec", lambda name: None if name == "triton" else name)
    assert create_target("auto").name == "cpu"
    assert "triton is not installed: pip install 'slipstream[cuda]'" in caplog.text


def test_the_trial_is_valid_python() -> None:
    """With stand-ins for torch and triton, since neither need be here."""
    torch = SimpleNamespace(
        cuda=SimpleNamespace(OutOfMemoryError=MemoryError),
        zeros=lambda *_, device: SimpleNamespace(item=lambda: device),
    )
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setitem(sys.modules, "torch", torch)
        patched.setitem(sys.modules, "triton", SimpleNamespace())
        exec(detect._TRIAL, {})


def test_auto_makes_no_engine_that_is_too_new_for_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "gpu_capability", lambda: (8, 0))
    with pytest.raises(BuildError, match=r"needs a GPU of sm_89 or newer.* this one is sm_80"):
        check_runs_here("auto", "sm_89")
    for target, capability in (("cuda", "sm_89"), ("auto", "sm_80"), ("auto", "any")):
        check_runs_here(target, capability)
