"""What is known of GPUs without importing torch."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

# Bytes of shared memory that one program may have, by compute capability; 99 KiB on the others.
_SHARED_MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may have on a GPU of this compute capability."""
    return _SHARED_MEMORY.get(capability, 99 << 10)


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
