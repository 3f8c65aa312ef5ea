from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slipstream import __version__
from slipstream.builder import cache
from slipstream.builder.build import build
from slipstream.builder.cache import cache_directory, cached_engine
from slipstream.builder.engine import is_engine, open_engine
from slipstream.errors import BuildError, CheckpointError


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The outputs of builds into an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outputs: list[Path] = []

    def counted(source: Any, output: Path, *rest: Any) -> object:  # noqa: ANN401
        outputs.append(output)
        return build(source, output, *rest)

    monkeypatch.setattr(cache, "build", counted)
    return outputs


def test_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "slipstream" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory() == Path.home() / ".cache" / "slipstream" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "slipstream" / "engines"


def test_the_second_call_builds_nothing(checkpoint: Path, builds: list[Path]) -> None:
    told: list[tuple[int, int]] = []
    first = cached_engine(checkpoint, {}, lambda done, total: told.append((done, total)))
    open_engine(first).verify_files()
    assert first.parent == cache_directory() and first.name.startswith("model-")
    assert told[-1][0] == told[-1][1] > 0
    told.clear()
    assert cached_engine(str(checkpoint), {}, lambda *_: told.append((0, 0))) == first
    assert builds == [first] and not told


def test_options_of_the_runtime_make_no_other_engine(checkpoint: Path, builds: list[Path]) -> None:
    first = cached_engine(checkpoint, {})
    assert cached_engine(checkpoint, {"num_threads": 1, "kv_cache_bytes": 1 << 20}) == first
    assert len(builds) == 1


@pytest.mark.parametrize(
    "options", [{"quantization": "int8_wo"}, {"kv_cache_dtype": "int8"}, {"max_seq_len": 100}]
)
def test_another_recipe_is_another_engine(
    checkpoint: Path, builds: list[Path], options: dict[str, Any]
) -> None:
    assert cached_engine(checkpoint, {}) != cached_engine(checkpoint, options)
    assert len(builds) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_another_engine(checkpoint: Path, builds: list[Path], name: str) -> None:
    first = cached_engine(checkpoint, {})
    status = (checkpoint / name).stat()
    os.utime(checkpoint / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert cached_engine(checkpoint, {}) != first
    assert len(builds) == 2


def test_another_version_is_another_engine(
    checkpoint: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_engine(checkpoint, {})
    monkeypatch.setattr(cache, "__version__", f"{__version__}.post1")
    cached_engine(checkpoint, {})
    monkeypatch.setattr(cache, "FORMAT_VERSION", 99)
    cached_engine(checkpoint, {})
    assert len(set(builds)) == 3


def test_a_failed_build_leaves_nothing_to_be_found(checkpoint: Path, builds: list[Path]) -> None:
    (checkpoint / "tokenizer.json").rename(checkpoint.parent / "tokenizer.json")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
            cached_engine(checkpoint, {})
    assert len(builds) == 2 and not any(map(is_engine, builds))
    assert not list(cache_directory().iterdir())


def test_bad_options_and_sources(checkpoint: Path, builds: list[Path]) -> None:
    with pytest.raises(BuildError, match="quantization is 'int3'"):
        cached_engine(checkpoint, {"quantization": "int3"})
    with pytest.raises(CheckpointError, match="does not exist"):
        cached_engine(checkpoint / "no" / "such" / "model", {})
    assert not builds
