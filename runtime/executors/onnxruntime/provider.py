"""Which execution provider of the installed ONNX Runtime runs an engine, and what to do where none
does."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnxruntime as ort

from slipstream.builder.engine import Manifest
from slipstream.errors import EngineMismatchError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OLDEST = (1, 24)
_LIBRARY = "libonnxruntime_providers_cuda.so"
_SWAP = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
log = logging.getLogger(__name__)


def require(manifest: Manifest) -> None:
    """Raise EngineMismatchError unless the ONNX Runtime that is installed can run an engine."""
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < OLDEST:
        raise EngineMismatchError(
            f"the engine needs onnxruntime {'.'.join(map(str, OLDEST))} or newer and "
            f"{ort.__version__} is installed; upgrade it: pip install --upgrade {_package()}"
        )
    if manifest.capability in ort.get_available_providers() or manifest.capability == "any":
        return
    if manifest.capability == CUDA:
        raise EngineMismatchError(
            f"the engine runs on the {CUDA} of onnxruntime and the package installed is "
            f"{_package()} {ort.__version__}, which has {', '.join(ort.get_available_providers())};"
            f" install the one for GPUs in its place: {_SWAP}; or build the engine for a CPU: "
            f"{manifest.command} --dtype float32"
        )
    raise EngineMismatchError(
        f"the engine runs on the {manifest.capability} of onnxruntime and the one installed has "
        f"{', '.join(ort.get_available_providers())}; build it again: {manifest.command}"
    )


def wanted_provider(manifest: Manifest) -> str:
    """The provider to try first: CUDA wherever an engine and the package know it."""
    if manifest.capability != "any":
        return manifest.capability
    return CUDA if CUDA in ort.get_available_providers() else CPU


def provider_options(provider: str, *, capture: bool) -> list[Any]:
    """What sessions are told of a provider; ``capture`` lets it replay CUDA graphs."""
    if provider == CPU:
        return [CPU]
    options = {
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if capture else "0",
    }
    return [(CUDA, options), CPU]


def session_entries(provider: str, rows: int) -> dict[str, str]:
    """Configuration of sessions beside that of their provider, where a step decodes at most
    ``rows`` tokens; releases that do not know an entry ignore it."""
    # The provider's own kernel is the quickest with one row, and has no other.
    if provider == CPU or rows == 1:
        return {}
    # Integer weights are multiplied as they are, also with several rows of x, not widened first.
    return {"ep.cuda.fpa_intb_gemm": "1"}


def load_libraries(provider: str) -> None:
    """Load the libraries of CUDA that NVIDIA's packages brought, where the system has none."""
    if provider == CUDA:
        told = StringIO()
        with redirect_stdout(told):  # it prints what it does not find
            ort.preload_dlls()
        for line in told.getvalue().splitlines():
            log.debug("onnxruntime: %s", line)


def check_loaded(manifest: Manifest, provider: str, session: ort.InferenceSession) -> str:
    """The provider that a session runs on: where CUDA did not load, the CPU with a warning, or
    EngineMismatchError for an engine that only CUDA runs."""
    if provider in session.get_providers():
        return provider
    problem = (
        f"the {provider} of {_package()} {ort.__version__} did not load ({_why_not()}); install "
        f"what it is built for, CUDA {cuda_version() or 'of its release notes'} and cuDNN 9, and a "
        "driver for that"
    )
    if manifest.capability == CUDA:
        raise EngineMismatchError(f"{problem}; check nvidia-smi")
    log.warning("%s; the engine runs on the CPU", problem)
    return CPU


def cuda_version() -> str:
    """The release of CUDA that the package was built for; nothing for one without."""
    version: Mapping[str, object] = vars(ort)
    return str(version.get("cuda_version") or "")


def _package() -> str:
    """The name of the package, as it says itself."""
    return str(vars(ort).get("package_name") or "onnxruntime")


def _why_not() -> str:
    """What the loader of libraries says of the provider's."""
    library = Path(str(ort.__file__)).parent / "capi" / _LIBRARY
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return "its libraries are there, and it finds no device"
