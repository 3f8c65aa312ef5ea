"""What is known of GPUs without importing torch."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

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


@cache
def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of the first NVIDIA GPU; None where there is none whose driver
    works."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute, value in ((_MAJOR, major), (_MINOR, minor)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return major.value, minor.value


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


def _obstacle(capability: tuple[int, int]) -> str | None:
    if capability < OLDEST:
        return f"it is {sm(capability)}, and the kernels need {sm(OLDEST)} or newer"
    missing = next((package for package in ("torch", "triton") if find_spec(package) is None), None)
    if missing is not None:
        return f"{missing} is not installed: pip install 'slipstream[cuda]'"
    # In a process of its own: a build needs neither torch in memory nor a context on the GPU.
    command = [sys.executable, "-c", _TRIAL]
    try:
        tried = subprocess.run(
            command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"trying it failed ({error})"
    if tried.returncode == 0:
        return None
    last = tried.stderr.strip().rpartition("\n")[2]
    return f"torch cannot use it ({last}); install a torch with CUDA that fits the driver"


def sm(capability: tuple[int, int]) -> str:
    """``sm_80`` for (8, 0)."""
    return f"sm_{capability[0]}{capability[1]}"
