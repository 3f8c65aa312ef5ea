"""Pages in files, and what a peer that lies can reach with them."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.handover.files import FileTransport
from slipstream.runtime.handover.label import Labels
from slipstream.runtime.handover.staging import Staging
from slipstream.runtime.handover.transport import LostHandover

NAME = "0123456789abcdef" * 2
TOKENS = [1, 2, 3, 4, 5]


def staging_of(slots: int = 4, *widths: int) -> Staging:
    parts = [np.zeros((slots, width), np.uint8) for width in widths or (6, 3)]
    return Staging(range(slots), parts, 4)


@pytest.fixture
def staging() -> Staging:
    made = staging_of()
    for number, part in enumerate(made.parts):
        part[:] = np.arange(part.size).reshape(part.shape) + number
    return made


@pytest.fixture
def transport(tmp_path: Path, staging: Staging) -> FileTransport:
    return FileTransport(tmp_path, staging, timeout=60)


def label(staging: Staging, tokens: list[int] = TOKENS, salt: str = "", engine: str = "e") -> bytes:
    return Labels(staging, engine).of(tokens, salt)


def files(root: Path) -> list[str]:
    (directory,) = root.iterdir()
    return sorted(os.listdir(directory))


def lost(transport: FileTransport, name: str, told: bytes, slots: list[int]) -> str:
    with pytest.raises(LostHandover) as caught:
        transport.take({"transfer_id": name}, told, slots)
    return caught.value.reason


def test_pages_come_as_they_went_and_once(
    tmp_path: Path, staging: Staging, transport: FileTransport
) -> None:
    transport.offer(NAME, label(staging), [2, 0])
    assert files(tmp_path) == [NAME] and transport.is_open(NAME)
    theirs = staging_of()
    taking = FileTransport(tmp_path, theirs, timeout=60)
    taking.take({"transfer_id": NAME}, label(theirs), [1, 3])
    for source, target in zip(staging.parts, theirs.parts, strict=True):
        assert np.array_equal(target[[1, 3]], source[[2, 0]])
        assert not target[[0, 2]].any()
    assert not files(tmp_path) and not transport.is_open(NAME)
    assert lost(taking, NAME, label(theirs), [1, 3]) == "missing"


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_threads_share_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("slipstream.runtime.handover.files._SHARE", 1)
    ours, theirs = staging_of(12), staging_of(12)
    for part in ours.parts:
        part[:] = np.random.default_rng(0).integers(0, 256, part.shape)
    slots = list(range(11, 11 - count, -1))
    told = FileTransport(tmp_path, ours, timeout=60).offer(NAME, label(ours), slots)
    FileTransport(tmp_path, theirs, timeout=60).take(told, label(theirs), slots[::-1])
    for source, target in zip(ours.parts, theirs.parts, strict=True):
        assert np.array_equal(target[slots[::-1]], source[slots])


def test_only_whose_pages_they_are_may_take_them(
    tmp_path: Path, staging: Staging, transport: FileTransport
) -> None:
    transport.offer(NAME, label(staging), [0, 1])
    for other, reason in (
        (label(staging, [1, 2, 3, 4, 6]), "prompt"),
        (label(staging, TOKENS[:4]), "prompt"),
        (label(staging, salt="another caller"), "prompt"),
        (label(staging, engine="f"), "engine"),
        (label(staging_of(4, 9)), "engine"),
    ):
        assert lost(transport, NAME, other, [2, 3]) == reason
    assert lost(transport, NAME, label(staging), [2, 3, 1]) == "engine"
    # It is there still for whom it is for.
    transport.take({"transfer_id": NAME}, label(staging), [2, 3])


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../secret",
        "/etc/passwd",
        "secret",
        NAME.upper(),
        f"{NAME}\n",
        f"{NAME}.part",
        NAME[:31],
    ],
)
def test_names_reach_no_other_files(
    tmp_path: Path, staging: Staging, transport: FileTransport, name: str
) -> None:
    (directory,) = tmp_path.iterdir()
    for place in (tmp_path / "secret", directory / "secret", directory / f"{NAME}.part"):
        place.write_bytes(label(staging) + bytes(100))
    with pytest.raises(LostHandover):
        transport.take({"transfer_id": name}, label(staging), [0])
    with pytest.raises(LostHandover):
        transport.withdraw(name)
    with pytest.raises(LostHandover):
        transport.offer(name, label(staging), [0])
    assert (tmp_path / "secret").exists() and (directory / "secret").exists()
    transport.sweep()
    assert (directory / "secret").exists(), "no file of ours"


def test_a_link_is_not_followed(tmp_path: Path, staging: Staging, transport: FileTransport) -> None:
    (directory,) = tmp_path.iterdir()
    secret = tmp_path / "secret"
    secret.write_bytes(label(staging) + bytes(staging.slot_bytes))
    (directory / NAME).symlink_to(secret)
    assert lost(transport, NAME, label(staging), [0]) == "missing"


def test_nobody_else_may_read_them(
    tmp_path: Path, staging: Staging, transport: FileTransport
) -> None:
    transport.offer(NAME, label(staging), [0])
    (directory,) = tmp_path.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / NAME).stat().st_mode) == 0o600
    directory.chmod(0o755)
    with pytest.raises(InvalidRequestError, match="others than this user may enter"):
        FileTransport(tmp_path, staging, timeout=60)


def test_a_place_where_there_can_be_none_is_refused(tmp_path: Path, staging: Staging) -> None:
    with pytest.raises(InvalidRequestError, match="give another kv_transfer_path"):
        FileTransport(tmp_path / "nowhere", staging, timeout=60)
    (tmp_path / f"slipstream-{os.geteuid()}").symlink_to(tmp_path)
    with pytest.raises(InvalidRequestError, match="cannot be handed over"):
        FileTransport(tmp_path, staging, timeout=60)


def test_what_nobody_takes_is_freed_by_any_worker(
    tmp_path: Path, staging: Staging, transport: FileTransport
) -> None:
    killed = FileTransport(tmp_path, staging, timeout=0.01)
    killed.offer("f" * 32, label(staging), [0])
    transport.offer(NAME, label(staging), [0])
    (directory,) = tmp_path.iterdir()
    cut_off = directory / f"{'e' * 32}.part"
    cut_off.touch()
    time.sleep(0.02)
    assert transport.sweep() == 1
    assert files(tmp_path) == [NAME, cut_off.name]
    long_ago = time.time() - 61
    os.utime(cut_off, (long_ago, long_ago))
    assert transport.sweep() == 1 and files(tmp_path) == [NAME]
    transport.withdraw(NAME)
    transport.withdraw(NAME)
    assert not files(tmp_path)


def test_a_directory_that_is_full_leaves_nothing(
    tmp_path: Path, staging: Staging, transport: FileTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:  # noqa: ANN401
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "utime", full)
    with pytest.raises(LostHandover, match="no room"):
        transport.offer(NAME, label(staging), [0])
    assert not files(tmp_path)


def test_a_file_that_was_cut_off_is_not_taken(
    tmp_path: Path, staging: Staging, transport: FileTransport
) -> None:
    transport.offer(NAME, label(staging), [0, 1])
    (directory,) = tmp_path.iterdir()
    os.truncate(directory / NAME, 100)
    assert lost(transport, NAME, label(staging), [0, 1]) == "engine"
