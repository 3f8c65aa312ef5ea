"""Remembers, in Triton's cache on disk, whose kernels this machine has compiled to the last.

Finding out which kernels an engine launches takes a second or two at each start, and only to see
that all of them are there. What is remembered lies beside them and goes with them; a kernel that is
missing after all is compiled when it is launched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.cache import get_cache_manager, triton_key

from slipstream.plugins.cuda.precompile import Specialization, settle_key

_NAME = "slipstream-kernels"
_SOURCES = Path(__file__).parents[1]  # whose code says what is launched, with what options


def mark_of(engine: str, device: str) -> str:
    """A name for an engine's steps, told apart by ``engine``, on a GPU called ``device``, with the
    versions of all that makes kernels."""
    told = [engine, device, _sources(), triton_key(), torch.__version__]
    text = json.dumps([*told, sorted(get_cache_invalidating_env_vars().items())])
    return hashlib.sha256(text.encode()).hexdigest()


def are_compiled(mark: str) -> bool:
    """Whether ``remember`` was called here, for that mark. If so, the kernels get the keys by which
    their compiled forms are found."""
    file = get_cache_manager(mark).get_file(_NAME)
    if file is None:
        return False
    try:
        kernels = [
            getattr(import_module(module), name)
            for module, name in json.loads(Path(file).read_text())
        ]
    except (ImportError, AttributeError, ValueError):  # another package's, which has changed since
        return False
    for kernel in kernels:
        settle_key(kernel)
    return True


def remember(mark: str, kernels: Iterable[Specialization]) -> None:
    """Note that these are compiled, which are all of such steps."""
    functions = dict.fromkeys((kernel.module, kernel.name) for kernel in kernels)
    get_cache_manager(mark).put(json.dumps(list(functions)).encode(), _NAME)


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
