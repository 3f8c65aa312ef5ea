"""``slipstream doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import click

from slipstream import __version__
from slipstream.builder.targets.base import known_targets
from slipstream.errors import SlipstreamError
from slipstream.plugins import demands
from slipstream.plugins.cuda.detect import sm
from slipstream.runtime.executors import known_executors
from slipstream.server.command import Command
from slipstream.server.doctor import packages
from slipstream.server.doctor.machine import Machine, look
from slipstream.server.doctor.packages import Package
from slipstream.server.text import format_bytes, format_columns


@dataclass(frozen=True, slots=True)
class Target:
    """What keeps this machine from building engines of a target, and from running them."""

    name: str
    build: tuple[str, ...]
    run: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that is shown; ``libraries`` is what they say of themselves, if they were
    loaded."""

    machine: Machine
    packages: list[Package]
    libraries: dict[str, Mapping[str, object]]
    targets: list[Target]
    lacks: list[str]


@click.command(cls=Command)
@click.option(
    "--load",
    is_flag=True,
    help="Load what is installed, too, each library in a process of its own, and try the GPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(load: bool, as_json: bool) -> None:
    """Show what this machine has, what it can build and run, and how to mend what it lacks.

    Nothing heavy is imported without --load, so this works where an installation is broken. The
    exit status is 0 whatever is lacking; in JSON, "targets" has a list of sentences for each deed,
    empty where nothing is in its way.

    \b
    Examples:
      slipstream doctor
      slipstream doctor --load --json | jq '.targets[] | select(.run == []) | .name'
    """
    found = _examine(load)
    click.echo(json.dumps(_as_json(found), indent=2) if as_json else _as_text(found))


def _examine(load: bool) -> Findings:
    installed = packages.find()
    libraries = packages.load(installed) if load else {}
    broken = [
        f"{name} does not load ({answer['error']}): install it again"
        for name, answer in libraries.items()
        if "error" in answer
    ]
    missing = packages.missing(installed)
    targets = [
        Target(each.name, (*missing, *each.build), (*missing, *each.run)) for each in _targets(load)
    ]
    lacks = [*missing, *packages.clashes(installed), *broken]
    return Findings(look(), installed, libraries, targets, lacks)


def _targets(load: bool) -> Iterator[Target]:
    try:
        names = {**known_targets(), **known_executors()}
    except SlipstreamError as error:  # two packages bring one name
        names = {}
        yield Target("all", (str(error),), (str(error),))
    for name in names:
        yield Target(name, _lacks(name, "build", load), _lacks(name, "run", load))


def _lacks(target: str, deed: demands.Deed, load: bool) -> tuple[str, ...]:
    known = known_targets() if deed == "build" else known_executors()
    if target not in known:
        return (f"nothing that is installed here can {deed} it: install the package that does",)
    try:
        return tuple(demands.lacks(target, deed, thorough=load))
    except SlipstreamError as error:
        return (str(error),)


def _as_json(found: Findings) -> dict[str, object]:
    return {"slipstream": __version__, **asdict(found)}


def _as_text(found: Findings) -> str:
    machine = found.machine
    sections: dict[str, Sequence[Sequence[object]]] = {
        "machine": [
            ("slipstream", __version__),
            ("python", machine.python),
            ("system", machine.system),
            *_processor_rows(machine),
            ("memory", _memory(machine)),
            *_gpu_rows(machine),
        ],
        "packages": [_package_row(package) for package in found.packages],
        "loaded": [
            (name, "; ".join(f"{key} {_shown(value)}" for key, value in answer.items()))
            for name, answer in found.libraries.items()
        ],
        "targets": [
            (target.name, f"build: {_verdict(target.build)}", f"run: {_verdict(target.run)}")
            for target in found.targets
        ],
        "to mend": [(sentence,) for sentence in _sentences(found)],
    }
    return "\n\n".join(
        f"{title}\n{format_columns(rows)}" for title, rows in sections.items() if rows
    )


def _processor_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    cpu = machine.processor
    yield "processor", f"{cpu.model or 'unknown'} ({cpu.architecture})"
    yield "features", " ".join(cpu.features) or "none that kernels here choose by"
    first, *others = cpu.instruction_sets or ("none",)
    yield "kernels", f"{first} (also {', '.join(others)})" if others else first
    yield "cores", f"{cpu.usable_cores} of {cpu.cores} may be used, by affinity and CPU quota"


def _memory(machine: Machine) -> str:
    memory = machine.memory
    parts = [
        f"{format_bytes(size)} {what}"
        for what, size in (
            ("in all", memory.total),
            ("free for use", memory.available),
            ("for this container", memory.limit),
        )
        if size is not None
    ]
    return ", ".join(parts) or "unknown"


def _gpu_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    if machine.driver is None:
        yield "GPU", "no NVIDIA driver that works"
        return
    version, (major, minor) = machine.driver_version or "unknown", machine.driver.cuda
    yield "driver", f"{version}, up to CUDA {major}.{minor}"
    for gpu in machine.driver.gpus:
        yield "GPU", f"{gpu.name}, {sm(gpu.capability)}, {format_bytes(gpu.memory)}"


def _package_row(package: Package) -> tuple[str, str]:
    if package.version is not None:
        return package.name, package.version
    named = package.name if package.extra is None else f"'slipstream[{package.extra}]'"
    return package.name, f"not installed: pip install {named}"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verdict(lacks: Sequence[str]) -> str:
    return "no" if lacks else "yes"


def _sentences(found: Findings) -> Iterator[str]:
    """Each once, with all that it is in the way of."""
    yield from found.lacks
    told: dict[tuple[str, str], list[str]] = {}
    for target in found.targets:
        for deed, lacks in (("build for", target.build), ("run", target.run)):
            for sentence in lacks:
                if sentence not in found.lacks:
                    told.setdefault((deed, sentence), []).append(target.name)
    for (deed, sentence), names in told.items():
        yield f"to {deed} {' and '.join(names)}: {sentence}"
