"""What is known of GPUs without importing torch."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from slipstream.errors import ExecutionError
from slipstream.interpreter import interpreter
from slipstream.plugins.demands import Deed

log = logging.getLogger(__name__)
OLDEST = (8, 0)  # that the kernels are compiled for

# Bytes of shared memory that one program may have, by compute capability; 99 KiB on the others.
_SHARED_MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR, _MINOR = 75, 76
# A GPU whose memory others have taken works.
_TRIAL = """
import torch, triton
try:
    torch.zeros(1, device="cuda").item()
except torch.cuda.OutOfMemoryError:
    pass
"""
_TRIAL_SECONDS = 180


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may have on a GPU of this compute capability."""
    return _SHARED_MEMORY.get(capability, 99 << 10)


@dataclass(frozen=True, slots=True)
class GPU:
    """An NVIDIA GPU: the driver's name of it, its compute capability, its memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: the newest CUDA that it runs, and the GPUs that this process may use."""

    cuda: tuple[int, int]
    gpus: tuple[GPU, ...]


@cache
def driver() -> Driver | None:
    """The driver of this machine; None where there is none that works."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        if library.cuInit(0):
            return None
        version = _asked(library.cuDriverGetVersion)
        count = _asked(library.cuDeviceGetCount)
        gpus = tuple(_gpu(library, ordinal) for ordinal in range(count))
    except (OSError, AttributeError):  # none, one that reports an error, or only its stub
        return None
    return Driver((version // 1000, version % 1000 // 10), gpus)


def _gpu(library: ctypes.CDLL, ordinal: int) -> GPU:
    device = _asked(library.cuDeviceGet, ordinal)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _expect(library.cuDeviceGetName(name, len(name), device))
    _expect(library.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    major, minor = (
        _asked(library.cuDeviceGetAttribute, attribute, device) for attribute in (_MAJOR, _MINOR)
    )
    return GPU(name.value.decode(errors="replace"), (major, minor), memory.value)


def _asked(function: Callable[..., int], *arguments: int) -> int:
    """What a function of the driver writes; OSError where it fails."""
    value = ctypes.c_int()
    _expect(function(ctypes.byref(value), *arguments))
    return value.value


def _expect(status: int) -> None:
    if status:
        raise OSError(f"the driver reports error {status}")


def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of the first NVIDIA GPU; None where there is none whose driver
    works."""
    found = driver()
    return found.gpus[0].capability if found is not None and found.gpus else None


@cache
def gpu_works() -> bool:
    """Whether there is an NVIDIA GPU that runs what is built for one; why not is logged once."""
    capability = gpu_capability()
    if capability is None:
        return False
    obstacle = _obstacle(capability)
    if obstacle is not None:
        log.warning("the GPU of this machine is not used: %s", obstacle)
    return obstacle is None


def demands(deed: Deed, *, thorough: bool) -> tuple[str, ...]:
    """As ``plugins.demands.Demands`` of target cuda."""
    if deed == "build":
        return ()
    lacks, capability = _missing_packages(), gpu_capability()
    if find_compiler() is None:
        lacks.append("Triton needs a C compiler to start its kernels: install gcc, or set CC")
    if capability is None:
        return (*lacks, f"no NVIDIA GPU works here: {_why_none()}")
    unusable = _too_old(capability)
    if thorough and not lacks and not unusable:
        unusable = _failed_trial()
    return (*lacks, *(f"the GPU cannot be used: {why}" for why in unusable))


def find_compiler() -> str | None:
    """The C compiler that Triton would call."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _why_none() -> str:
    if driver() is not None:
        return "the driver is there and shows none; check CUDA_VISIBLE_DEVICES"
    return "install NVIDIA's driver and check nvidia-smi, and start a container with --gpus all"


def _obstacle(capability: tuple[int, int]) -> str | None:
    found = [*_too_old(capability), *_missing_packages()] or _failed_trial()
    return found[0] if found else None


def _too_old(capability: tuple[int, int]) -> list[str]:
    if capability >= OLDEST:
        return []
    return [f"it is {sm(capability)}, and the kernels need {sm(OLDEST)} or newer"]


def _missing_packages() -> list[str]:
    missing = [package for package in ("torch", "triton") if find_spec(package) is None]
    return [f"{package} is not installed: pip install 'slipstream[cuda]'" for package in missing]


def _failed_trial() -> list[str]:
    # In a process of its own: a build needs neither torch in memory nor a context on the GPU.
    try:
        command = [interpreter(), "-P", "-c", _TRIAL]
        tried = subprocess.run(
            command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False
        )
    except (ExecutionError, OSError, subprocess.TimeoutExpired) as error:
        return [f"trying it failed ({error})"]
    if tried.returncode == 0:
        return []
    last = tried.stderr.strip().rpartition("\n")[2]
    return [f"torch cannot use it ({last}); install a torch with CUDA that fits the driver"]


def sm(capability: tuple[int, int]) -> str:
    """``sm_80`` for (8, 0)."""
    return f"sm_{capability[0]}{capability[1]}"
