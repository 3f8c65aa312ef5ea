"""Places for what is made: nothing of a user's is deleted, nothing is left, names change in one
step."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream.builder import output as module
from slipstream.builder.output import check_output, discard, publish, scratch, unfinished
from slipstream.errors import BuildError


def contents(directory: Path) -> set[str] | None:
    return {"thing.json", "data"} if (directory / "thing.json").is_file() else None


def check(output: Path, *sources: Path) -> None:
    check_output(output, "thing", contents, *sources)


def make(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text(name)
    return directory


def test_a_new_name_an_empty_directory_and_its_own_kind_are_taken(tmp_path: Path) -> None:
    check(tmp_path / "new" / "nested")
    check(make(tmp_path / "empty"))
    check(make(tmp_path / "old", "thing.json", "data"), make(tmp_path / "model", "config.json"))


def linked(place: Path) -> Path:
    (place / "link").symlink_to(make(place / "old", "thing.json"))
    return place / "link"


def dangling(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere")
    return place / "link"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "link": (linked, r"link is a symbolic link; choose another -o, or pass \S+/old itself"),
    "dangling": (dangling, "link is a symbolic link"),
    "here": (lambda place: Path("."), r"\. is the current directory or one above it, which cannot"),
    "above": (lambda place: Path(".."), r"\.\. is the current directory or one above"),
    "absolute": (lambda place: make(place / "old", "thing.json"), "is the current directory"),
    "root": (lambda place: Path("/"), "/ is the current directory or one above"),
    "file": (lambda place: make(place / "d", "f") / "f", "f exists and is no directory; choose"),
    "under a file": (
        lambda place: make(place / "d", "f") / "f" / "e",
        "d/f is no directory; choos",
    ),
    "other": (lambda place: make(place / "d", "f"), "d exists and is no thing; choose another -o"),
    "extra": (
        lambda place: make(place / "d", "thing.json", "notes.txt", "data"),
        r"d holds 1 files that are not part of its thing, such as notes\.txt, and would be deleted",
    ),
    "mount": (
        lambda place: Path("/proc"),
        "/proc is a mount point.* another -o, such as /proc/new",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_places_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, message = REFUSED[name]
    output = choose(tmp_path)
    monkeypatch.chdir(output if name == "absolute" else make(tmp_path / "here"))
    with pytest.raises(BuildError, match=message):
        check(output)


def test_the_source_and_what_holds_it_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "all" / "thing", "thing.json")
    (tmp_path / "link").symlink_to(source)
    for output in (source, source.parent):
        for given in (source, tmp_path / "link", source / "thing.json"):
            with pytest.raises(BuildError, match="is or holds the checkpoint"):
                check(output, given)
    check(source / "inside", source)


def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(BuildError, match=f"{tmp_path} may not be written; choose another -o"):
        check(tmp_path / "a" / "b")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_however_it_ends(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), scratch(tmp_path / "thing") as made:
        (made / "data").write_text("half")
        raise error
    with scratch(tmp_path / "thing"):
        pass
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from slipstream.builder.output import scratch
with scratch(Path(sys.argv[1])) as made:
    (made / "data").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "thing")], check=False)
    assert unfinished(tmp_path) == [tmp_path / "thing"]
    with scratch(tmp_path / "thing") as made:
        assert list(made.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_one_is_refused_or_waits(tmp_path: Path) -> None:
    waiting = (
        "import sys; from pathlib import Path; from slipstream.builder.output import scratch\n"
        "with scratch(Path(sys.argv[1]), wait=True): print('in')\n"
    )
    with scratch(tmp_path / "thing"):
        with pytest.raises(BuildError, match="another run is writing into"):
            discard(tmp_path / "thing")
        other = subprocess.Popen(
            [sys.executable, "-c", waiting, str(tmp_path / "thing")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stderr is not None
        assert "another process is writing into" in other.stderr.readline()
        assert other.poll() is None
    assert other.communicate() == ("in\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_old_one_is_whole_until_the_new_one_is(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make(tmp_path / "thing", "old")
    if not exchanges:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    held = os.open(output, os.O_RDONLY)
    try:
        with scratch(output) as made:
            (made / "new").write_text("")
            publish(made, output)
            assert [file.name for file in output.iterdir()] == ["new"]
            assert os.listdir(held) == ["old"]  # a process that has it keeps it
    finally:
        os.close(held)
    assert list(tmp_path.iterdir()) == [output]


def test_the_old_one_comes_back_where_the_new_one_cannot_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make(tmp_path / "thing", "old")
    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    with pytest.raises(FileNotFoundError), scratch(output) as made:
        made.rmdir()
        publish(made, output)
    assert [file.name for file in output.iterdir()] == ["old"]


def test_discarding(tmp_path: Path) -> None:
    discard(make(tmp_path / "thing", "data"))
    discard(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with scratch(tmp_path / "thing") as made:
        (made / "thing.json").write_text(json.dumps({}))
        publish(made, tmp_path / "thing")
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]
