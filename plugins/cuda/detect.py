"""Whether this machine can run CUDA engines, found without importing torch."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec


@cache
def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU whose driver works, and the libraries to use it."""
    if find_spec("torch") is None or find_spec("triton") is None:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    return count.value > 0
