"""Threads are counted in one place, which knows affinity and CPU quotas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slipstream import cores
from slipstream.cores import usable_cores

ROOT = Path(__file__).parents[1]
V2 = "31 23 0:41 / {mount} rw,relatime - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "_PROCESS", tmp_path)


def describe(process: Path, group: str, mounts: str) -> None:
    (process / "cgroup").write_text(group)
    (process / "mountinfo").write_text("23 1 0:5 / / rw - ext4 /dev/root rw\n" + mounts)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("", 8),
        ("nonsense 0", 8),
    ],
)
def test_a_quota_of_version_2_bounds_threads(quota: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs" / "cpu.max").write_text(quota + "\n")
    describe(tmp_path, "0::/\n", V2.format(mount=tmp_path / "fs"))
    assert usable_cores() == expected


@pytest.mark.parametrize("limited", ["fs", "fs/pod", "fs/pod/box"])
def test_the_quota_of_any_group_above_counts(limited: str, tmp_path: Path) -> None:
    (tmp_path / "fs" / "pod" / "box").mkdir(parents=True)
    (tmp_path / "fs" / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    (tmp_path / limited / "cpu.max").write_text("300000 100000\n")
    describe(tmp_path, "0::/pod/box\n", V2.format(mount=tmp_path / "fs"))
    assert usable_cores() == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("400000", 4)])
@pytest.mark.parametrize(
    ("root", "group", "place"),
    [("/", "/", ""), ("/", "/box", "box"), ("/docker/1", "/docker/1", ""), ("/d", "/other", "")],
)
def test_a_quota_of_version_1_bounds_threads(
    quota: str, expected: int, root: str, group: str, place: str, tmp_path: Path
) -> None:
    directory = tmp_path / "a b" / place
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (directory / "cpu.cfs_period_us").write_text("100000\n")
    mount = str(tmp_path / "a b").replace(" ", r"\040")
    hybrid = V1.format(root=root, mount=mount) + V2.format(mount=tmp_path / "unified")
    describe(tmp_path, f"3:memory:/x\n2:cpu,cpuacct:{group}\n0::/\n", hybrid)
    assert usable_cores() == expected


def test_a_machine_without_control_groups_has_its_affinity() -> None:
    assert usable_cores() == 8


def test_nothing_else_counts_cores() -> None:
    counting = re.compile(r"sched_getaffinity|process_cpu_count|multiprocessing\.cpu_count")
    folders = ("weights", "plugins", "builder", "quantize", "runtime", "server", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert [file for file in files if counting.search(file.read_text())] == []
    counts = sorted(file.name for file in files if "os.cpu_count" in file.read_text())
    assert counts == ["machine.py", "report.py"]  # the machine's, beside usable_cores
