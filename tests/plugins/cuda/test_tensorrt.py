"""What a machine lacks for TensorRT, by package and GPU; nothing is imported."""

from __future__ import annotations

import pytest

from slipstream.plugins.cuda import detect, tensorrt


def installed(monkeypatch: pytest.MonkeyPatch, *flavours: str) -> None:
    monkeypatch.setattr(tensorrt, "module_of", lambda name: name if name in flavours else None)
    monkeypatch.setattr(detect, "demands", lambda deed, *, thorough: ())


@pytest.mark.parametrize(
    ("flavours", "capability", "told"),
    [
        (("tensorrt_rtx",), (9, 0), "sm_121, and this GPU is sm_90: use --target cuda, or"),
        (("tensorrt_rtx",), (8, 9), None),
        (("tensorrt",), (9, 0), None),
        (("tensorrt_rtx", "tensorrt"), (9, 0), None),
        ((), (8, 9), "no TensorRT is installed: pip install 'slipstream[tensorrt]'"),
    ],
)
def test_a_gpu_that_no_plan_is_for_is_told(
    monkeypatch: pytest.MonkeyPatch,
    flavours: tuple[str, ...],
    capability: tuple[int, int],
    told: str | None,
) -> None:
    installed(monkeypatch, *flavours)
    monkeypatch.setattr(detect, "gpu_capability", lambda: capability)
    lacks = tensorrt.demands("run", thorough=False)
    assert len(lacks) == (told is not None) and (told or "") in "".join(lacks)


def test_only_the_package_for_the_gpu_that_is_there_needs_one_to_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detect, "gpu_capability", lambda: None)
    installed(monkeypatch, "tensorrt")
    (told,) = tensorrt.demands("build", thorough=False)
    assert "makes plans only for a GPU that is here" in told
    installed(monkeypatch, "tensorrt_rtx")
    assert tensorrt.demands("build", thorough=False) == ()
