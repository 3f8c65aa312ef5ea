"""Begins, before torch is imported, what the import would otherwise wait for.

Loading the libraries of torch and CUDA, and making a context on the GPU, take seconds in which an
import holds the interpreter's lock. Foreign functions hold none: called from a thread they run
beside the imports of everything else, and torch finds its libraries loaded and the context made.
Whatever fails here is met again, and reported, by whoever needs it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from slipstream.builder.engine import WEIGHTS, Engine
from slipstream.phases import phase

# In this order torch loads them: what CUDA's libraries share is seen by all, the rest is not.
_LIBRARIES = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", os.RTLD_LOCAL))
_INTERPRETED = "TRITON_INTERPRET"  # kernels run on the CPU


_begun: set[Path] = set()


def begin(engine: Engine) -> None:
    """Start threads that load torch's libraries, make a context on the GPU and have the system
    read an engine's weights; returns at once, and does nothing the second time."""
    weights = engine.path / WEIGHTS
    if weights in _begun:
        return
    works: list[Callable[[], None]] = [lambda: _read_ahead(weights)]
    if not _begun:
        works += _once()
    _begun.add(weights)
    for work in works:
        threading.Thread(target=work, name="slipstream-ahead", daemon=True).start()


def _once() -> list[Callable[[], None]]:
    """What a process does once."""
    if "torch" in sys.modules:
        return []
    works = [_load_libraries]
    if os.environ.get(_INTERPRETED) != "1":
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, but here first
        works.append(_make_context)
    return works


def _load_libraries() -> None:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return
    with phase("libraries of torch, ahead"):
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
        for name, mode in _LIBRARIES:
            library = Path(spec.origin).with_name("lib") / name
            # One that cannot be loaded so, for torch to find where else it looks, is no matter.
            if not library.exists() or dlopen(os.fsencode(library), os.RTLD_NOW | mode) is None:
                return


def _make_context() -> None:
    """The context that torch will use, of the first GPU that this process sees."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    with phase("context of the GPU, ahead"):
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _read_ahead(file: Path) -> None:
    """Let the system read a file before anybody waits for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
