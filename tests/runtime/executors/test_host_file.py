"""A file of pages: found again as it was left, refused where it is not what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.runtime.engine.host_pages import HostPages, HostSpace, Record
from slipstream.runtime.executors.host_file import HostFile

SLOT = 128


def name(number: int) -> bytes:
    return bytes([number]) * 32


def opened(path: Path, count: int = 3, slot_bytes: int = SLOT, engine: str = "fp_1") -> HostFile:
    return HostFile(path, count, slot_bytes, engine)


def written(path: Path) -> list[Record]:
    file = opened(path)
    records = [Record(2, name(1), b"", 0), Record(0, name(2), name(1), 3)]
    for record in records:
        file.data[record.slot] = record.slot + 7
        file.note(record)
    file.close()
    return records


def test_what_was_noted_is_found_least_recently_stored_first(tmp_path: Path) -> None:
    first, second = written(tmp_path / "kv")
    file = opened(tmp_path / "kv")
    found = file.found()
    assert [record.slot for record in found] == [2, 0]
    assert found[1] == second and found[0].digest == first.digest
    assert all(file.is_intact(record.slot) for record in found)
    assert (file.data[0] == 7).all()

    file.erase(2)
    file.note(Record(1, name(3), b"", 0))
    assert [record.slot for record in file.found()] == [0, 1]
    file.close()
    assert sorted(os.listdir(tmp_path)) == ["kv"]
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("offset", [0, -SLOT * 3])  # of an entry, of a page
def test_a_slot_that_the_machine_lost_is_not_read(tmp_path: Path, offset: int) -> None:
    written(tmp_path / "kv")
    with (tmp_path / "kv").open("r+b") as raw:
        raw.seek(offset or 4096, os.SEEK_SET if offset == 0 else os.SEEK_END)
        raw.write(b"?")
    file = opened(tmp_path / "kv")
    host = HostPages(HostSpace(3, file))
    kept, lost = host.get(name(1)), host.get(name(2))
    assert kept is not None and lost is None
    host.check_invariants()
    file.close()


def test_only_what_has_landed_is_found(tmp_path: Path) -> None:
    file = opened(tmp_path / "kv", count=1)
    host = HostPages(HostSpace(1, file))
    page = host.put(name(1), b"", 0)
    assert page is not None and not file.found()
    host.land([page])
    assert len(file.found()) == 1
    assert host.put(name(2), b"", 0) is not None, "whose slot is about to be written"
    assert not file.found()
    file.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "fp_2"}, r"holds pages of another engine \(fp_1\)"),
        ({"count": 4}, "has 3 slots of 128 bytes"),
        ({"slot_bytes": 256}, "has 3 slots of 128 bytes"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, options: dict[str, int], reason: str) -> None:
    written(tmp_path / "kv")
    with pytest.raises(EngineMismatchError, match=f"{reason}.*delete it"):
        opened(tmp_path / "kv", **options)  # type: ignore[arg-type]
    opened(tmp_path / "kv").close()


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "kv")
    whole = (tmp_path / "kv").read_bytes()
    (tmp_path / "kv").write_bytes(whole[:-1])
    with pytest.raises(EngineMismatchError, match="it was cut off"):
        opened(tmp_path / "kv")
    for torn in (b"", whole[:20], b"x" + whole[1:], whole[:50] + b"\1" + whole[51:]):
        (tmp_path / "kv").write_bytes(torn)
        with pytest.raises(EngineMismatchError, match="is no file of KV pages"):
            opened(tmp_path / "kv")


def test_a_file_has_one_engine_at_a_time(tmp_path: Path) -> None:
    file = opened(tmp_path / "kv")
    with pytest.raises(EngineMismatchError, match="in use by another engine"):
        opened(tmp_path / "kv")
    file.close()
    opened(tmp_path / "kv").close()


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="cannot be made"):
        opened(tmp_path / "nowhere" / "kv")
    for impossible in (tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(CapacityError, match="cannot be made or opened"):
            opened(impossible)
    with pytest.raises(CapacityError, match="lower --kv-offload-gib"):
        opened(tmp_path / "kv", count=1, slot_bytes=1 << 62)
    with pytest.raises(CapacityError, match="no file is so large"):
        opened(tmp_path / "kv", count=1 << 80)
    assert not list(tmp_path.iterdir())


def test_what_was_asked_is_its_owners_alone(tmp_path: Path) -> None:
    opened(tmp_path / "kv").close()
    assert (tmp_path / "kv").stat().st_mode & 0o077 == 0
