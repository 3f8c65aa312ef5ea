"""How many threads this process can keep busy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROCESS = Path("/proc/self")


def usable_cores() -> int:
    """Cores that this process may run on, or fewer where a CPU quota buys it less: at least 1.

    A quota is that of a control group (``cpu.max``, or version 1's ``cpu.cfs_quota_us``) or of one
    above it, as containers have them. Threads beyond it are all stopped for the rest of a period,
    and every step waits for its slowest thread; so a fraction of a core counts for nothing.
    """
    quotas = (_quota(group) for group in control_groups("cpu"))
    cores = [int(quota) for quota in quotas if quota is not None]
    return max(1, min([_allowed(), *cores]))


def _allowed() -> int:
    """Cores of this process's affinity; all of them where a system knows none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def control_groups(controller: str) -> Iterator[Path]:
    """The directories of the control groups that hold this process to a share of something (``cpu``
    or ``memory``), each with those above it; see cgroups(7) and proc(5)."""
    entries = (line.split(":", 2) for line in _lines(_PROCESS / "cgroup"))
    paths = {name: path for _, names, path in entries for name in names.split(",")}
    for line in _lines(_PROCESS / "mountinfo"):
        place, _, kind = line.partition(" - ")
        root, mount = (_unescaped(field) for field in place.split(" ")[3:5])
        fields = kind.split(" ")
        version_1 = fields[0] == "cgroup" and controller in fields[-1].split(",")
        path = paths.get(controller if version_1 else "")
        if path is not None and (version_1 or fields[0] == "cgroup2"):
            # A container that sees only its own group may still be told the host's path of it.
            inside = PurePosixPath(path).is_relative_to(root)
            below = PurePosixPath(path).relative_to(root) if inside else PurePosixPath()
            yield from (Path(mount, part) for part in (below, *below.parents))


def _quota(group: Path) -> float | None:
    """How many cores a group's quota buys; None where there is none."""
    words = [word for line in _lines(group / "cpu.max") for word in line.split()]
    if not words:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [line for name in names for line in _lines(group / name)]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None  # "max", or -1 in version 1
    return int(words[0]) / int(words[1])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
