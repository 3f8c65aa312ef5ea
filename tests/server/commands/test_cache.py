"""``slipstream cache list`` and ``prune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slipstream.builder.cache import cache_directory, cached_engine
from slipstream.server.cli import slipstream


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["cache", *map(str, arguments)])


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_directory()


def test_an_empty_cache(directory: Path) -> None:
    result = run("list")
    assert result.exit_code == 0
    assert result.stdout == f"{directory}: 0 engines, 0 B of at most 100.0 GiB\n"
    assert run("prune").exit_code == 0 and not directory.exists()


def test_what_is_listed_can_be_pruned(tiny_checkpoint: Path, directory: Path) -> None:
    engine = cached_engine(tiny_checkpoint, {})
    first, _, row = run("list").stdout.splitlines()
    assert first.startswith(f"{directory}: 1 engines, ")
    assert row.split()[0] == engine.name and row.endswith(str(tiny_checkpoint))
    (told,) = json.loads(run("list", "--json").stdout)["engines"]
    assert (told["path"], told["source"]) == (str(engine), str(tiny_checkpoint))
    assert told["usable"] and told["size"] == sum(f.stat().st_size for f in engine.iterdir())
    assert engine.name not in run("prune").stdout and engine.is_dir()
    assert f"removed {engine}\n" in run("prune", "--max-size", 0).stdout
    assert list(directory.iterdir()) == []
