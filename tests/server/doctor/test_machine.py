"""Machines of all kinds are looked at; what cannot be found out is left out."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from slipstream import cores
from slipstream.errors import MissingDependencyError
from slipstream.plugins import library
from slipstream.plugins.cuda import detect
from slipstream.server.doctor import machine

CPUINFO = "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 fma avx512_vnni\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"
MEMINFO = "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:    8192 kB\n"
V2 = "31 23 0:41 / {mount} rw,relatime - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 / {mount} rw,relatime shared:9 - cgroup cgroup rw,memory\n"


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any of the files that are read."""
    for name in ("_CPU", "_MEMORY", "_DRIVER"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    monkeypatch.setattr(cores, "_PROCESS", tmp_path)
    monkeypatch.setattr(machine, "driver", lambda: None)
    return tmp_path


def test_nothing_that_can_be_read_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> tuple[str, ...]:
        raise MissingDependencyError("not compiled")

    monkeypatch.setattr(library, "isas", fails)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # as on macOS
    found = machine.look()
    assert found.memory == machine.Memory(None, None, None)
    assert (found.processor.model, found.processor.features) == (None, ())
    assert found.processor.instruction_sets == () and found.processor.usable_cores >= 1
    assert found.driver is None and found.driver_version is None


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        (CPUINFO, "Fast CPU", ("avx2", "fma", "avx512_vnni")),
        (ARM, None, ("asimd", "asimddp", "i8mm")),
        ("\x00\xff nonsense", None, ()),
    ],
)
def test_features_are_the_kernels_words(
    files: Path, text: str, model: str | None, features: tuple[str, ...]
) -> None:
    (files / "_CPU").write_text(text, encoding="latin-1")
    found = machine.look().processor
    assert (found.model, found.features) == (model, features)
    assert found.instruction_sets == library.isas()


@pytest.mark.parametrize(
    ("mount", "group", "file", "text", "limit"),
    [
        (V2, "0::/\n", "memory.max", "4194304\n", 4 << 20),
        (V2, "0::/\n", "memory.max", "max\n", None),
        (V1, "5:memory:/\n", "memory.limit_in_bytes", "4194304\n", 4 << 20),
        (V1, "5:memory:/\n", "memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_a_containers_memory_is_told_where_it_bounds(
    files: Path, mount: str, group: str, file: str, text: str, limit: int | None
) -> None:
    (files / "_MEMORY").write_text(MEMINFO)
    (files / "cgroup").write_text(group)
    (files / "mountinfo").write_text(mount.format(mount=files / "group"))
    (files / "group").mkdir()
    (files / "group" / file).write_text(text)
    assert machine.look().memory == machine.Memory(16 << 20, 8 << 20, limit)


def test_the_drivers_own_number_is_told(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "_DRIVER").write_text("580.65.06\n")
    monkeypatch.setattr(machine, "driver", lambda: detect.Driver((13, 0), ()))
    assert machine.look().driver_version == "580.65.06"


def test_a_library_of_another_machine_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str) -> ctypes.CDLL:
        raise OSError("wrong ELF class")

    monkeypatch.setattr("ctypes.CDLL", fails)
    library.load.cache_clear()
    assert machine.look().processor.instruction_sets == ()
    (sentence,) = library.demands("run", thorough=False)
    assert "does not load (wrong ELF class)" in sentence and "install Slipstream again" in sentence
    assert library.demands("build", thorough=False) == ()
