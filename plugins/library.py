"""Finds and loads the native CPU plugins that installation compiled."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

from slipstream.errors import MissingDependencyError


@cache
def path() -> str:
    """File of the shared library; MissingDependencyError when it was never compiled."""
    spec = find_spec("slipstream.plugins._cpu")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "The native CPU plugins are not compiled: install a C++17 compiler (g++ or clang++) "
            "and run "
            "'pip install --force-reinstall --no-deps slipstream' (or 'pip install -e .' in a "
            "checkout)."
        )
    return spec.origin


@cache
def load() -> ctypes.CDLL:
    """The library with its C entry points (see the end of ``plugins/cpu/kernels.cpp``)."""
    library = ctypes.CDLL(path())
    library.slipstream_isas.restype = ctypes.c_char_p
    return library


def isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs and the library holds, best first."""
    return tuple(load().slipstream_isas().decode().split(","))
