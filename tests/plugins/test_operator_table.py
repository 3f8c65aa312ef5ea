"""Operators of other packages, found by entry points."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.errors import BuildError
from slipstream.extensions import entry_points
from slipstream.plugins.operators import OperatorTable


def installed(folder: Path, package: str, entry: str) -> None:
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[test.operators]\n{entry}\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.cache_clear()
    yield tmp_path
    entry_points.cache_clear()


OURS = {"Linear": "slipstream.plugins.linear:SPEC"}


def test_two_operators_of_one_name_are_refused(folder: Path) -> None:
    installed(folder, "one", "Linear = elsewhere:SPEC")
    table = OperatorTable(OURS, "test.operators")
    assert table["Linear"].name == "Linear"  # ours needs no look at the others
    with pytest.raises(BuildError, match=r"operator Linear: .*elsewhere:SPEC"):
        list(table)


def test_two_packages_that_bring_one_name_are_refused(folder: Path) -> None:
    installed(folder, "one", "Far = nowhere:SPEC")
    installed(folder, "two", "Far = elsewhere:SPEC")
    with pytest.raises(BuildError, match=r"bring Far of test\.operators: .*where:SPEC; uninstall"):
        list(OperatorTable(OURS, "test.operators"))


def test_an_entry_that_is_no_spec_is_refused(folder: Path) -> None:
    installed(folder, "one", "Linear2 = slipstream.plugins.linear:SPEC")
    table = OperatorTable(OURS, "test.operators")
    assert [*table] == ["Linear", "Linear2"]
    with pytest.raises(BuildError, match="installed as the operator Linear2, is not its Operator"):
        table["Linear2"]
    with pytest.raises(KeyError):
        table["Nothing"]


def test_nothing_is_imported_before_it_is_asked_for(folder: Path) -> None:
    installed(folder, "one", "Far = nowhere_at_all:SPEC")
    table = OperatorTable(OURS, "test.operators")
    assert "Far" in list(table) and len(table) == 2
    with pytest.raises(BuildError, match=r"nowhere_at_all:SPEC of test\.operators cannot be"):
        table["Far"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("Far = made_for_another", "unexpected keyword argument 'colour'"),
        ("Far = :SPEC", "Empty module name"),
    ],
)
def test_an_entry_that_cannot_be_made_is_refused(folder: Path, entry: str, reason: str) -> None:
    source = "from slipstream.plugins.spec import OperatorSpec\nSPEC = OperatorSpec(colour=1)\n"
    (folder / "made_for_another.py").write_text(source)
    installed(folder, "one", entry)
    with pytest.raises(BuildError, match=rf"of test\.operators cannot be loaded \(.*{reason}"):
        OperatorTable(OURS, "test.operators")["Far"]
