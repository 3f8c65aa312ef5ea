"""Which program is a Python, for processes that a build or a running engine starts."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from slipstream.errors import ExecutionError


def interpreters() -> Iterator[str]:
    """Programs that are a Python, the likeliest first. Where one is embedded, as in Triton's stub,
    ``sys.executable`` is empty or that program, which must not be started once more."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    names = [name, "python3", "python"]
    folders = filter(None, (sysconfig.get_path("scripts"), sysconfig.get_config_var("BINDIR")))
    places = [shutil.which(name, path=folder) for folder in folders for name in names]
    found = [shutil.which(sys.executable or name), *places, *map(shutil.which, names)]
    for program in dict.fromkeys(filter(None, found)):
        if Path(program).name.lower().startswith("python"):
            yield program


def interpreter() -> str:
    """The likeliest of them; ExecutionError if there is none."""
    for program in interpreters():
        return program
    raise ExecutionError(
        "no Python can be started: there is no python3 on PATH; put the one that runs the engine "
        "there"
    )
