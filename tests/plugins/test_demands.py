"""The table of what targets need, to which packages add."""

from __future__ import annotations

import pytest

from slipstream.errors import BuildError
from slipstream.plugins import demands


def test_a_target_without_demands_lacks_nothing() -> None:
    assert demands.lacks("nobody's", "run", thorough=True) == ()


def test_ours_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demands.lacks("cpu", "build", thorough=False) == ()
    monkeypatch.setattr(demands, "_DEMANDS", {"cpu": "slipstream.plugins.library:nothing"})
    with pytest.raises(BuildError, match=r"library:nothing of slipstream.demands cannot be loaded"):
        demands.lacks("cpu", "run", thorough=False)


def test_an_installed_package_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "slipstream.plugins.library:demands"
    monkeypatch.setattr(demands, "entry_points", lambda group: {"theirs": place, "cpu": "a:b"})
    assert demands.lacks("theirs", "build", thorough=False) == ()
    assert demands.lacks("cpu", "build", thorough=False) == ()  # ours count
