from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slipstream import __version__
from slipstream.builder import cache
from slipstream.builder.build import build_once
from slipstream.builder.cache import cache_directory, cached_engine, cached_engines, prune
from slipstream.builder.engine import is_engine, open_engine
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets import base
from slipstream.errors import BuildError, CheckpointError


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The outputs of builds into an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outputs: list[Path] = []

    def counted(source: Any, output: Path, *rest: Any) -> bool:  # noqa: ANN401
        outputs.append(output)
        return build_once(source, output, *rest)

    monkeypatch.setattr(cache, "build_once", counted)
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


@pytest.mark.parametrize(
    "name", ["serve.log", "README.md", "trainer_state.json", "pytorch_model.bin", "original/x.json"]
)
def test_a_file_that_no_reader_reads_makes_no_other_engine(
    checkpoint: Path, builds: list[Path], name: str
) -> None:
    first = cached_engine(checkpoint, {})
    for text in ("", "more"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(text)
        assert cached_engine(checkpoint, {}) == first
    assert builds == [first]


@pytest.mark.parametrize("name", ["chat_template.jinja", "quantize_config.json"])
def test_a_file_that_a_reader_would_read_makes_another_engine(
    checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = cache._key(checkpoint, BuildOptions())
    (checkpoint / name).unlink(missing_ok=True)
    without = cache._key(checkpoint, BuildOptions())
    (checkpoint / name).write_text("{}")
    assert cache._key(checkpoint, BuildOptions()) not in (key, without)


@pytest.mark.parametrize("name", [".#config.json", "config.json~", "tokenizer.model"])
def test_a_broken_link_is_no_file(checkpoint: Path, builds: list[Path], name: str) -> None:
    (checkpoint / name).symlink_to("user@host.1234")  # an editor's lock
    cached_engine(checkpoint, {})
    assert len(builds) == 1


def test_the_key_holds_every_file_that_a_build_opens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, since audit hooks stay."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from slipstream.builder.build import build\n"
        "from slipstream.builder.checkpoints import files_of\n"
        "from slipstream.builder.options import BuildOptions\n"
        "root, opened = Path(sys.argv[1]), set()\n"
        "def hook(event, args):\n"
        "    if event == 'open' and isinstance(args[0], (str, os.PathLike)):\n"
        "        opened.add(os.fspath(args[0]))\n"
        "sys.addaudithook(hook)\n"
        "build(root, Path(sys.argv[2]), BuildOptions())\n"
        "found = {Path(name).name for name in opened if Path(name).parent == root}\n"
        "known = {file.name for file in files_of(root)}\n"
        "assert found == known, found ^ known\n"
        "assert 'model.safetensors' in found and 'tokenizer.json' in found\n"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint), str(tmp_path / "e")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_has_one_engine_by_whatever_path(
    checkpoint: Path, builds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    paths = (checkpoint, tmp_path / "link", "model", "link", "./model/")
    (engine,) = {cached_engine(path, {}) for path in paths}
    assert builds == [engine]
    assert Path(open_engine(engine).manifest.source).is_absolute()


def test_the_key_holds_what_auto_chose(
    checkpoint: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_engine(checkpoint, {})
    assert cached_engine(checkpoint, {"target": "cpu"}) == first
    monkeypatch.setattr(base, "gpu_works", lambda: True)
    assert cached_engine(checkpoint, {}) != first
    assert len(builds) == 2


RACE = """
import sys; from pathlib import Path
from slipstream.builder.cache import cached_engine
print("ready", flush=True)
sys.stdin.readline()
print(cached_engine(Path(sys.argv[1]), {}).name)
"""


def test_processes_that_want_one_engine_build_it_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-c", RACE, str(checkpoint)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    racers = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    ends = [racer.communicate("go\n") for racer in racers]
    names = {out.strip() for out, _ in ends}
    assert [racer.returncode for racer in racers] == [0, 0], ends
    assert [file.name for file in cache_directory().iterdir()] == [*names]


def test_an_engine_that_another_made_meanwhile_is_as_good(
    checkpoint: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first has ended, and waits."""
    inside, found, told = threading.Event(), list[Path](), list[int]()

    def progress(done: int, total: int) -> None:
        inside.set()
        while len(builds) < 2:
            time.sleep(0.01)

    first = threading.Thread(target=lambda: found.append(cached_engine(checkpoint, {}, progress)))
    first.start()
    assert inside.wait(60)
    found.append(cached_engine(checkpoint, {}, lambda done, _: told.append(done)))
    first.join()
    assert found[0] == found[1] and len(builds) == 2 and told == []


def test_the_engines_that_were_used_longest_ago_go(
    checkpoint: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLIPSTREAM_CACHE_SIZE", raising=False)
    old, used = (cached_engine(checkpoint, {"max_seq_len": n}) for n in (64, 65))
    for age, engine in ((300, used), (200, old)):
        os.utime(engine / "engine.json", (age, age))
    size = max(engine.size for engine in cached_engines())
    monkeypatch.setenv("SLIPSTREAM_CACHE_SIZE", str(2 * size + size // 2))
    assert cached_engine(checkpoint, {"max_seq_len": 64}) == old  # which is now the newest
    newest = cached_engine(checkpoint, {"max_seq_len": 66})
    assert {engine.path for engine in cached_engines()} == {old, newest}
    assert len(builds) == 3


def test_an_engine_larger_than_the_limit_stays_until_another_comes(
    checkpoint: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE_SIZE", "1K")
    engines = [cached_engine(checkpoint, {"max_seq_len": n}) for n in (64, 65)]
    assert [engine.path for engine in cached_engines()] == engines[1:]
    monkeypatch.setenv("SLIPSTREAM_CACHE_SIZE", "much")
    with pytest.raises(BuildError, match="SLIPSTREAM_CACHE_SIZE is no size: 'much' is not a size"):
        cached_engine(checkpoint, {})


def test_pruning_what_cannot_be_used_again(
    checkpoint: Path, builds: list[Path], tmp_path: Path
) -> None:
    gone = Path(shutil.copytree(checkpoint, tmp_path / "gone"))
    good, other, orphan = (
        cached_engine(*arguments)
        for arguments in ((checkpoint, {}), (checkpoint, {"max_seq_len": 64}), (gone, {}))
    )
    shutil.rmtree(gone)
    manifest = json.loads((other / "engine.json").read_text())
    (other / "engine.json").write_text(json.dumps({**manifest, "slipstream_version": "0.0.1"}))
    left = cache_directory() / ".model-0.making"
    (left / "model-0").mkdir(parents=True)
    (left / "model-0" / "weights.safetensors").write_text("half")
    usable = {engine.path: engine.usable for engine in cached_engines()}
    assert usable == {good: True, other: False, orphan: False}
    waiting = cache_directory() / f".{good.name}.making"  # by one that has not seen it yet
    waiting.mkdir()
    assert prune(1 << 40) == [] and not left.exists() and not waiting.exists()
    assert is_engine(good)
    removed = prune(1 << 40, unusable=True)
    assert {engine.path for engine in removed} == {other, orphan}
    assert list(cache_directory().iterdir()) == [good]
