"""Which of the packages that Slipstream can use are installed, by what their metadata says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"extra == [\"']([\w-]+)[\"']")
_DEVELOPING = "dev"
# Distributions whose library can be asked, and its module. Several of one module overwrite each
# other's files.
_MODULES = {
    **dict.fromkeys(
        (
            *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-migraphx"),
            *("onnxruntime-openvino", "onnxruntime-qnn", "onnxruntime-rocm"),
        ),
        "onnxruntime",
    ),
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "tensorrt-rtx-cu13-bindings": "tensorrt_rtx_bindings",
    "torch": "torch",
    "triton": "triton",
}
# What a library says of itself and its devices.
_QUESTIONS = {
    "onnxruntime": "{'version': m.__version__, 'providers': m.get_available_providers()}",
    "torch": "{'version': m.__version__, 'cuda': m.version.cuda, 'gpus': m.cuda.device_count()}",
    "triton": "{'version': m.__version__}",
    "tensorrt": "{'version': m.__version__}",
    "tensorrt_rtx": "{'version': m.__version__}",
    "tensorrt_rtx_bindings": "{'version': m.__version__}",
}
_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution; ``version`` is None where it is not installed, and ``extra`` that of ours
    which brings it, None for what every installation has."""

    name: str
    version: str | None
    extra: str | None = None


def find() -> list[Package]:
    """What Slipstream needs, what its extras bring, and installed libraries that run engines."""
    wanted = {name: Package(name, _version(name), extra) for name, extra in _requirements()}
    for name in _MODULES.keys() - wanted.keys():
        if (version := _version(name)) is not None:
            wanted[name] = Package(name, version)
    return [wanted[name] for name in sorted(wanted)]


def missing(packages: Iterable[Package]) -> list[str]:
    """A sentence for each that no target does without."""
    packages = list(packages)
    modules = _by_module(packages)
    names = [p.name for p in packages if p.extra is None and p.version is None]
    absent = [name for name in names if _MODULES.get(name) not in modules]
    return [f"{name} is not installed: pip install {name}" for name in absent]


def clashes(packages: Iterable[Package]) -> list[str]:
    """A sentence for those that are in each other's way."""
    return [
        f"{' and '.join(names)} overwrite each other's files: pip uninstall -y {' '.join(names)}, "
        "then install one of them"
        for names in _by_module(packages).values()
        if len(names) > 1
    ]


def _by_module(packages: Iterable[Package]) -> dict[str, list[str]]:
    """Installed distributions whose library can be asked, by its module."""
    modules: dict[str, list[str]] = {}
    for package in packages:
        if package.version is not None and package.name in _MODULES:
            modules.setdefault(_MODULES[package.name], []).append(package.name)
    return modules


def load(packages: Iterable[Package]) -> dict[str, Mapping[str, object]]:
    """What installed libraries say once they are imported, by module, each in a process of its own;
    ``error`` where one cannot be."""
    return {module: _answer(module) for module in sorted(_by_module(packages))}


def _answer(module: str) -> Mapping[str, object]:
    code = f"import json, {module} as m; print('\\n' + json.dumps({_QUESTIONS[module]}))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    try:
        # Libraries print, too.
        answer: Mapping[str, object] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        said = done.stderr.strip().rpartition("\n")[2]
        return {"error": said or f"it ended with status {done.returncode}"}
    return answer


def _requirements() -> Iterator[tuple[str, str | None]]:
    """Names, and the extra that asks for each; what several ask for is the first's."""
    try:
        requirements = metadata.requires("slipstream") or []
    except metadata.PackageNotFoundError:
        return  # a checkout that was not installed
    seen: set[str] = set()
    for requirement in requirements:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name is None or (extra is not None and extra[1] == _DEVELOPING):
            continue
        if (normal := _normal(name[0])) not in seen:
            seen.add(normal)
            yield normal, extra[1] if extra is not None else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
