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
    for function in (detect.driver, detect.gpu_works):
        function.cache_clear()
    yield
    for function in (detect.driver, detect.gpu_works):
        function.cache_clear()


class Driver:
    """libcuda with one GPU of a compute capability, or none."""

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self._capability = capability

    def cuInit(self, flags: int) -> int:
        return 0 if self._capability else 100

    def cuDriverGetVersion(self, value: Any) -> int:  # noqa: ANN401
        value._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, value: Any) -> int:  # noqa: ANN401
        value._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: ANN401
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: object) -> int:  # noqa: ANN401
        name.value = b"NVIDIA Stand-in"
        return 0

    def cuDeviceTotalMem_v2(self, value: Any, device: object) -> int:  # noqa: ANN401
        value._obj.value = 80 << 30
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
    monkeypatch.setattr("shutil.which", lambda name, path=None: name)


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


def test_the_driver_is_asked_for_all_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (9, 0))
    gpu = detect.GPU("NVIDIA Stand-in", (9, 0), 80 << 30)
    assert detect.driver() == detect.Driver((13, 1), (gpu,))
    assert detect.gpu_capability() == (9, 0)


@pytest.mark.parametrize("missing", ["cuInit", "cuDeviceGetName", "cuDriverGetVersion"])
def test_a_stub_of_the_driver_is_none(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    machine(monkeypatch, (9, 0))
    monkeypatch.delattr(Driver, missing)
    assert detect.driver() is None and detect.gpu_capability() is None


def test_what_a_gpu_lacks_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None)
    assert detect.demands("build", thorough=True) == ()
    (sentence,) = detect.demands("run", thorough=True)
    assert "no NVIDIA GPU works here" in sentence and "--gpus all" in sentence
    monkeypatch.setattr(detect, "driver", lambda: detect.Driver((13, 0), ()))
    assert "check CUDA_VISIBLE_DEVICES" in detect.demands("run", thorough=True)[0]


def test_an_old_gpu_a_missing_package_and_compiler_are_all_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, (7, 5))
    monkeypatch.setattr(detect, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    monkeypatch.delenv("CC", raising=False)
    torch, triton, compiler, gpu = detect.demands("run", thorough=True)
    assert "torch is not installed: pip install" in torch and "triton" in triton
    assert "install gcc" in compiler
    assert gpu.startswith("the GPU cannot be used: it is sm_75")


def test_only_a_thorough_look_tries_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (9, 0), "assert False, 'no'")
    assert detect.demands("run", thorough=False) == ()
    (sentence,) = detect.demands("run", thorough=True)
    assert sentence.startswith("the GPU cannot be used: torch cannot use it (AssertionError: no)")
