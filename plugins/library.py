"""Finds and loads the native libraries that hold the CPU kernels of operators."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from slipstream.errors import EngineMismatchError, MissingDependencyError, SlipstreamError
from slipstream.plugins.demands import Deed
from slipstream.plugins.operators import OPERATORS

OURS = "slipstream.plugins._cpu"
SUFFIX = ".so"
ISA = "SLIPSTREAM_CPU_ISA"
_log = logging.getLogger(__name__)


def modules(operators: Iterable[str]) -> tuple[str, ...]:
    """The libraries that these operators' CPU kernels are in, each once."""
    natives = (OPERATORS[name].native for name in operators)
    return tuple(dict.fromkeys(native for native in natives if native is not None))


@cache
def path(module: str = OURS) -> str:
    """File of a shared library; MissingDependencyError when it was never compiled."""
    package, _, name = module.rpartition(".")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder, name + SUFFIX) for folder in folders or ()]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        distribution = module.partition(".")[0]
        raise MissingDependencyError(
            f"The native CPU plugins {module} are not compiled: install a C++17 compiler (g++ or "
            f"clang++) and run 'pip install --force-reinstall --no-deps {distribution}' (or "
            f"'pip install -e .' in a checkout)."
        )
    return str(found)


@cache
def load(module: str = OURS) -> ctypes.CDLL:
    """A library with its C entry points (see the end of ``plugins/cpu/kernels.cpp``).

    Its sessions run the instruction set that ``$SLIPSTREAM_CPU_ISA`` names, by default the best;
    EngineMismatchError for one that this machine or the library does not have.
    """
    library = ctypes.CDLL(path(module))
    library.slipstream_isas.restype = ctypes.c_char_p
    wanted = os.environ.get(ISA)
    if wanted and library.slipstream_prefer(wanted.encode()) != 0:
        raise EngineMismatchError(
            f"{ISA} is {wanted!r}, and {module} has no kernels of that name that this machine "
            f"runs: set it to one of {', '.join(_names(library))}, or unset it for the best"
        )
    _log.info("%s runs %s", module, _names(library)[0])
    return library


def isas(module: str = OURS) -> tuple[str, ...]:
    """Instruction sets that this machine runs and the library holds: the one that sessions run,
    then the others, best first."""
    return _names(load(module))


def demands(deed: Deed, *, thorough: bool) -> tuple[str, ...]:
    """As ``plugins.demands.Demands`` of target cpu, whose engines run on our library."""
    if deed == "build":
        return ()
    try:
        load()
    except SlipstreamError as error:
        return (str(error),)
    except OSError as error:
        return (
            f"{path()} does not load ({error}): it was made for another machine; install Slipstream"
            " again, here",
        )
    return ()


def _names(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(library.slipstream_isas().decode().split(","))
