"""What is said of a machine whose ONNX Runtime does not run an engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream.builder.build import build
from slipstream.builder.engine import Manifest, open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import EngineMismatchError, MissingDependencyError
from slipstream.runtime import executors
from slipstream.runtime.executors import check_device
from slipstream.runtime.executors.onnxruntime import provider
from slipstream.runtime.executors.onnxruntime.provider import CPU, CUDA, require

Package = Callable[..., None]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "engine"
    build(tiny_checkpoint, path, BuildOptions(target="onnxruntime"))
    return path


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    return open_engine(engine).manifest


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    """Put another package in the place of the one installed."""

    def put(name: str, version: str, *providers: str, **more: Any) -> None:  # noqa: ANN401
        stand_in = SimpleNamespace(
            __version__=version,
            __file__="/nowhere/__init__.py",
            package_name=name,
            cuda_version="13.0" if name.endswith("gpu") else "",
            get_available_providers=lambda: list(providers),
            **more,
        )
        monkeypatch.setattr(provider, "ort", stand_in)

    return put


def test_the_installed_one_runs_it(manifest: Manifest) -> None:
    require(manifest)
    require(replace(manifest, capability=CPU))


def test_a_release_that_is_too_old(manifest: Manifest, package: Package) -> None:
    package("onnxruntime-gpu", "1.23.2", CUDA, CPU)
    with pytest.raises(
        EngineMismatchError,
        match=r"needs onnxruntime 1.24 or newer and 1.23.2.*--upgrade onnxruntime-gpu",
    ):
        require(manifest)


def test_the_package_for_cpus_where_the_one_for_gpus_is_needed(
    manifest: Manifest, package: Package
) -> None:
    package("onnxruntime", "1.32.0", "AzureExecutionProvider", CPU)
    with pytest.raises(
        EngineMismatchError,
        match=r"installed is onnxruntime 1.32.0.*pip uninstall -y onnxruntime && .*onnxruntime-gpu"
        r".*--dtype float32",
    ):
        require(replace(manifest, capability=CUDA))


def test_no_package_at_all(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        executors, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    with pytest.raises(MissingDependencyError, match=r"needs onnxruntime.*pip install onnxruntime"):
        check_device(open_engine(engine))


def test_a_provider_that_did_not_load(
    manifest: Manifest, package: Package, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that a CPU runs, too, goes on there, with a warning."""
    package("onnxruntime-gpu", "1.31.1", CUDA, CPU)
    session = SimpleNamespace(get_providers=lambda: [CPU])
    with caplog.at_level(logging.WARNING):
        assert provider.check_loaded(manifest, CUDA, session) == CPU
    assert "did not load (" in caplog.text and "CUDA 13.0" in caplog.text
    with pytest.raises(EngineMismatchError, match=r"libonnxruntime_providers_cuda.so.*nvidia-smi"):
        provider.check_loaded(replace(manifest, capability=CUDA), CUDA, session)


def test_cuda_is_taken_where_both_run_it(manifest: Manifest, package: Package) -> None:
    package("onnxruntime-gpu", "1.31.1", CUDA, CPU)
    assert provider.wanted_provider(manifest) == CUDA
    assert provider.wanted_provider(replace(manifest, capability=CPU)) == CPU


def test_sessions_take_entries_of_a_provider(engine: Path) -> None:
    """Also those of another, or of a release to come, which do nothing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    for name, value in provider.session_entries(CUDA, rows=2).items():
        options.add_session_config_entry(name, value)
    session = ort.InferenceSession(str(engine / "graph.onnx"), options, providers=[CPU])
    assert session.get_providers() == [CPU]
    assert provider.session_entries(CPU, rows=2) == {}


def test_the_kernel_of_several_rows_is_asked_for_where_there_are_several() -> None:
    assert provider.session_entries(CUDA, rows=1) == {}
    assert provider.session_entries(CUDA, rows=2) == {"ep.cuda.fpa_intb_gemm": "1"}


def test_what_preloading_prints_stays_off_the_terminal(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    package("onnxruntime-gpu", "1.31.1", CUDA, CPU, preload_dlls=lambda: print("lost"))  # noqa: T201
    provider.load_libraries(CUDA)
    assert capsys.readouterr().out == ""


def test_nothing_of_torch_is_loaded(engine: Path) -> None:
    """Running an engine imports neither torch nor Triton, nor the builder's libraries."""
    import subprocess

    code = (
        "import sys; from slipstream import LLM, SamplingParams\n"
        f"LLM({str(engine)!r}).generate('a', SamplingParams(max_tokens=2))\n"
        "print(sorted({'torch', 'triton', 'onnx', 'onnx_ir', 'gguf'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
