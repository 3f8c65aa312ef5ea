"""The table of targets, ours and those of installed packages."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from slipstream.builder.targets import base
from slipstream.builder.targets.base import create_target, known_targets
from slipstream.errors import BuildError


def test_an_installed_package_adds_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    module, target = ModuleType("abacus"), SimpleNamespace(name="abacus")
    module.TARGET = target  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "abacus", module)
    places = {"abacus": "abacus", "cpu": "elsewhere", "broken": "no_such_package"}
    monkeypatch.setattr(base, "entry_points", lambda group: places if group == base.GROUP else {})

    assert create_target("abacus") is target
    assert create_target("cpu").name == "cpu"  # ours are not replaced
    with pytest.raises(BuildError, match=r"no_such_package of slipstream\.targets cannot"):
        create_target("broken")
    with pytest.raises(BuildError, match=r"'x' is unknown; known targets: auto, .*abacus.*cuda"):
        create_target("x")


def test_our_own_targets_are_known() -> None:
    assert {"cpu", "cuda"} <= known_targets().keys()
