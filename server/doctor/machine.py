"""Processor, memory and GPUs of this machine. What cannot be found out is None or empty."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slipstream.cores import control_groups, usable_cores
from slipstream.errors import SlipstreamError
from slipstream.plugins import library
from slipstream.plugins.cuda.detect import Driver, driver

_CPU = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
_DRIVER = Path("/sys/module/nvidia/version")
# Those that kernels here, or libraries that run engines, choose by.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve"),
)
_LIMITS = ("memory.max", "memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Processor:
    """features are the kernel's words; instruction_sets those of our kernels, the one that runs
    first, and empty where the library was not compiled or does not load."""

    model: str | None
    architecture: str
    features: tuple[str, ...]
    instruction_sets: tuple[str, ...]
    cores: int | None
    usable_cores: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: of the machine, those free for use, and what a container may have of them."""

    total: int | None
    available: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Machine:
    """All of it; ``driver_version`` is NVIDIA's own number, ``driver`` what it answers."""

    system: str
    python: str
    processor: Processor
    memory: Memory
    driver_version: str | None
    driver: Driver | None


def look() -> Machine:
    """This machine."""
    libc = " ".join(platform.libc_ver())
    return Machine(
        system=f"{platform.system()} {platform.release()}, {libc or 'unknown libc'}",
        python=platform.python_version(),
        processor=_processor(),
        memory=_memory(),
        driver_version=_text(_DRIVER).strip() or None,
        driver=driver(),
    )


def _processor() -> Processor:
    entries = dict(_entries(_CPU))
    words = set((entries.get("flags") or entries.get("Features") or "").split())
    return Processor(
        model=entries.get("model name"),
        architecture=platform.machine(),
        features=tuple(name for name in _FEATURES if name in words),
        instruction_sets=_instruction_sets(),
        cores=os.cpu_count(),
        usable_cores=usable_cores(),
    )


def _instruction_sets() -> tuple[str, ...]:
    try:
        return library.isas()
    except (SlipstreamError, OSError):
        return ()


def _memory() -> Memory:
    entries = dict(_entries(_MEMORY))
    total = _kibibytes(entries.get("MemTotal"))
    limits = [int(text) for text in _limits() if text.isdecimal()]
    # Version 1 writes that there is no limit as a number that no machine has.
    bounding = [limit for limit in limits if total is None or limit < total]
    return Memory(total, _kibibytes(entries.get("MemAvailable")), min(bounding, default=None))


def _limits() -> Iterator[str]:
    for group in control_groups("memory"):
        yield from (_text(group / name).strip() for name in _LIMITS)


def _kibibytes(text: str | None) -> int | None:
    number = (text or "").removesuffix(" kB")
    return int(number) << 10 if number.isdecimal() else None


def _entries(file: Path) -> Iterator[tuple[str, str]]:
    for line in _text(file).splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
