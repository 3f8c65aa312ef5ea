from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream import __version__
from slipstream.builder.engine import (
    FORMAT_VERSION,
    EngineLimits,
    KVLayout,
    Manifest,
    is_engine,
    open_engine,
)
from slipstream.errors import EngineMismatchError

FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "graph.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "weights.safetensors",
)
MANIFEST = Manifest(
    target="cpu",
    model={"vocab_size": 320, "eos_token_ids": [1, 2]},
    limits=EngineLimits(3, 17, 96),
    kv=KVLayout("int8", 32, 2, 4, 16),
    quantization="int4_wo",
    plugins={"Linear": 1},
    source="/models/a b",
    command="slipstream build '/models/a b' -o engine",
    files={"graph.onnx": "00"},
)


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def edit(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = engine / "engine.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def assert_mismatch(action: Callable[[], object], *parts: str) -> str:
    """One sentence that says what was found and ends with a command that mends it."""
    with pytest.raises(EngineMismatchError) as caught:
        action()
    message = str(caught.value)
    assert re.search(r"; (build it again|make one with): slipstream build \S+ -o \S+", message)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


def test_a_manifest_survives_the_file(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text(MANIFEST.to_json())
    engine = open_engine(tmp_path)
    assert engine.manifest == MANIFEST
    assert engine.path == tmp_path
    assert engine.manifest.slipstream_version == __version__


@pytest.mark.parametrize(("dtype", "size"), [("float32", 256), ("float16", 128), ("int8", 72)])
def test_bytes_of_a_token(dtype: str, size: int) -> None:
    """k and v of one head in one layer: 32 numbers each; int8 adds a float32 scale to each."""
    assert KVLayout(dtype, 32, 1, 1, 32).bytes_per_token == size
    assert KVLayout(dtype, 32, 3, 2, 32).bytes_per_token == 6 * size


def test_a_fresh_engine_opens_and_is_whole(tiny_engine: Path) -> None:
    assert is_engine(tiny_engine)
    engine = open_engine(tiny_engine)
    assert tuple(engine.manifest.files) == FILES
    engine.verify_files()


def test_no_engine(tmp_path: Path) -> None:
    assert not is_engine(tmp_path)
    assert_mismatch(lambda: open_engine(tmp_path), "holds no engine.json")
    assert_mismatch(lambda: open_engine(tmp_path / "nothing"), "holds no engine.json")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_format(engine: Path, version: object) -> None:
    command = open_engine(engine).manifest.command
    edit(engine, lambda raw: raw.update(format_version=version))
    message = assert_mismatch(
        lambda: open_engine(engine), f"has format {version}", "reads format 1"
    )
    assert message.endswith(command)


@pytest.mark.parametrize(
    "content",
    ["", "{", "\xff\xfe", "[]", "3", "null", "{}", '{"command": "x"}', b"\xff\xfe\x00"],
)
def test_garbage(engine: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (engine / "engine.json").write_bytes(data)
    assert_mismatch(lambda: open_engine(engine), str(engine / "engine.json"))


FIELDS = [
    name
    for name, field in Manifest.__dataclass_fields__.items()
    if name not in ("format_version", "capability", "formats", "slipstream_version")
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(engine: Path, field: str) -> None:
    edit(engine, lambda raw: raw.pop(field))
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field", field)


@pytest.mark.parametrize("place", ["", "limits", "kv"])
def test_an_extra_field_is_named(engine: Path, place: str) -> None:
    edit(engine, lambda raw: (raw[place] if place else raw).update(colour="red"))
    assert_mismatch(lambda: open_engine(engine), "colour")


@pytest.mark.parametrize("place", ["limits", "kv"])
def test_a_part_that_is_no_object(engine: Path, place: str) -> None:
    edit(engine, lambda raw: raw.update({place: 3}))
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field")


@pytest.mark.parametrize(("name", "ours"), [("PagedAttention", "1"), ("Abacus", "none")])
def test_another_version_of_an_operator(engine: Path, name: str, ours: str) -> None:
    edit(engine, lambda raw: raw["plugins"].update({name: 2}))
    found = f"needs version 2 of operator {name} and Slipstream {__version__} has {ours}"
    assert_mismatch(lambda: open_engine(engine), found)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(engine: Path, name: str) -> None:
    (engine / name).unlink()
    assert_mismatch(open_engine(engine).verify_files, f"{name} is missing from the engine {engine}")


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte(engine: Path, name: str) -> None:
    data = bytearray((engine / name).read_bytes())
    data[len(data) // 2] ^= 1
    (engine / name).write_bytes(data)
    opened = open_engine(engine)
    message = assert_mismatch(opened.verify_files, f"{name} of the engine {engine} was changed")
    assert message.endswith(opened.manifest.command)


def test_a_truncated_file(engine: Path) -> None:
    data = (engine / "weights.safetensors").read_bytes()
    (engine / "weights.safetensors").write_bytes(data[:-1])
    assert_mismatch(open_engine(engine).verify_files, "weights.safetensors")


def test_a_file_that_comes_later_is_in_the_manifest(tiny_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    for text in ("{}", '{"other": 1}'):
        open_engine(copy).write_file("tactics.json", text)
        engine = open_engine(copy)
        assert (copy / "tactics.json").read_text() == text
        assert set(engine.manifest.files) == {*FILES, "tactics.json"}
        engine.verify_files()
