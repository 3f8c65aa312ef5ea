from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from safetensors.numpy import load_file
from tests.tiny_models import Arrays, llama_tensors, save_llama

from slipstream.builder import build as build_module
from slipstream.builder.build import build, plan
from slipstream.builder.contract import kv_dtype_of
from slipstream.builder.engine import open_engine
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions, Quantization
from slipstream.errors import BuildError, CheckpointError

CONTENT = [
    "chat_template.jinja",
    "engine.json",
    "generation_config.json",
    "graph.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "weights.safetensors",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("build"), llama_tensors())


QUANTIZED = [
    BuildOptions(quantization=quantization, group_size=group, symmetric=symmetric)
    for quantization in ("int8_wo", "int4_wo")
    for group in (32, 64, 128)
    for symmetric in (False, True)
]


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(),
        BuildOptions(kv_cache_dtype="int8"),
        BuildOptions(quantization="int4_wo", gemm_plugin="disable"),
        *QUANTIZED,
    ],
    ids=lambda o: o.command("", "").replace("slipstream build '' -o ''", "") or "default",
)
def test_the_directory_holds_what_its_format_says(
    checkpoint: Path, tmp_path: Path, options: BuildOptions
) -> None:
    told: list[tuple[int, int]] = []
    planned = plan(checkpoint, options)
    output = tmp_path / "engine"
    manifest = build(checkpoint, output, options, lambda *at: told.append(at))

    assert sorted(file.name for file in output.iterdir()) == CONTENT
    engine = open_engine(output)
    engine.verify_files()
    assert engine.manifest == manifest
    assert sorted([*manifest.files, "engine.json"]) == CONTENT
    assert manifest.quantization == options.quantization
    assert manifest.command == options.command(str(checkpoint), str(output))
    assert manifest.caches == planned.caches and manifest.graphs == planned.graphs
    assert manifest.limits == planned.limits
    assert ModelConfig.from_json(manifest.model) == planned.checkpoint.config

    file = output / "weights.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert planned.weight_bytes == file.stat().st_size - header
    assert told[-1] == (planned.weight_bytes, planned.weight_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert_weights_are_external(output)


def assert_weights_are_external(engine: Path) -> None:
    """graph.onnx points to the tensors that the safetensors library finds, and holds no data."""
    graph = onnx.load(engine / "graph.onnx", load_external_data=False).graph
    arrays = load_file(engine / "weights.safetensors")
    content = (engine / "weights.safetensors").read_bytes()
    external = {t.name: t for t in graph.initializer if t.external_data}
    assert external.keys() == arrays.keys()
    for name, tensor in external.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "weights.safetensors" and not tensor.raw_data
        start = int(place["offset"])
        assert content[start : start + int(place["length"])] == arrays[name].tobytes()
    assert (engine / "graph.onnx").stat().st_size < 64 << 10


def test_files_of_an_engine_can_be_read_by_others(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    build(checkpoint, tmp_path / "engine", BuildOptions())
    usual = (tmp_path / "made").stat().st_mode
    assert (tmp_path / "engine").stat().st_mode == usual


def test_a_build_is_reproducible(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(quantization="int4_wo")
    first, second = (build(checkpoint, tmp_path / name, options) for name in ("a", "b"))
    assert first.files == second.files


def test_auto_chooses_exact_pages_for_a_dense_engine_only(checkpoint: Path) -> None:
    def dtype(options: BuildOptions) -> str:
        return kv_dtype_of(plan(checkpoint, options).caches)

    assert dtype(BuildOptions()) == "float32"
    assert dtype(BuildOptions(quantization="int8_wo")) == "float16"
    assert dtype(BuildOptions(quantization="int8_wo", kv_cache_dtype="float32")) == "float32"


def test_limits(checkpoint: Path) -> None:
    limits = plan(checkpoint, BuildOptions(max_batch_size=3, max_num_tokens=17)).limits
    assert (limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len) == (3, 17, 512)
    planned = plan(checkpoint, BuildOptions(max_seq_len=100))
    assert planned.sequence_kv_bytes == 100 * 2 * 2 * 2 * 32 * 4
    with pytest.raises(BuildError, match=r"max_seq_len is 513, but .* use at most 512"):
        plan(checkpoint, BuildOptions(max_seq_len=513))
    with pytest.raises(BuildError, match="target 'abacus' is unknown; known targets: auto, cpu"):
        plan(checkpoint, BuildOptions(target="abacus"))


def test_an_engine_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    build(checkpoint, output, BuildOptions())
    build(checkpoint, output, BuildOptions(quantization="int8_wo"))
    assert sorted(file.name for file in output.iterdir()) == CONTENT
    assert open_engine(output).manifest.quantization == "int8_wo"


def test_what_is_no_engine_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    for output, kind in ((tmp_path, "engine"), (tmp_path / "precious", "directory")):
        with pytest.raises(BuildError, match=f"exists and is no {kind}; choose another -o"):
            build(checkpoint, output, BuildOptions())
    assert (tmp_path / "precious").read_text() == "data"


def test_a_build_deletes_nothing_of_the_users(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the work: not even headers are read."""
    model, engine = tmp_path / "model", tmp_path / "engine"
    shutil.copytree(checkpoint, model)
    build(model, engine, BuildOptions())
    (engine / "notes.txt").write_text("")
    # A checkpoint with an engine's manifest that lists it is still no engine.
    files = {file.name: "" for file in model.iterdir()}
    (model / "engine.json").write_text(json.dumps({"files": files}))
    (tmp_path / "link").symlink_to(model)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(build_module, "plan", None)
    for output, message in (
        (engine, "holds 1 files that are not part of its engine, such as notes.txt"),
        (model, "is or holds the checkpoint"),
        (tmp_path / "link", "is a symbolic link"),
        (tmp_path, "is or holds the checkpoint"),
    ):
        for source in (model, tmp_path / "link"):
            with pytest.raises(BuildError, match=message):
                build(source, output, BuildOptions())
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_file_that_came_during_the_build_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    build(checkpoint, output, BuildOptions())

    def save(done: int, total: int) -> None:
        (output / "notes.txt").write_text("")

    with pytest.raises(BuildError, match=r"such as notes\.txt"):
        build(checkpoint, output, BuildOptions(), save)
    assert list(tmp_path.iterdir()) == [output]
    open_engine(output).verify_files()


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [(build_module, "write_weights"), (onnx_ir, "save"), (shutil, "copyfile")],
    ids=["weights", "graph", "tokenizer"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,  # noqa: ANN401
    name: str,
    existing: bool,
) -> None:
    output = tmp_path / "engine"
    if existing:
        build(checkpoint, output, BuildOptions())
    monkeypatch.setattr(module, name, fail)
    message = f"cannot write the engine {output}: No space left on device"
    with pytest.raises(BuildError, match=message):
        build(checkpoint, output, BuildOptions())
    assert list(tmp_path.iterdir()) == ([output] if existing else [])
    if existing:
        open_engine(output).verify_files()


def test_a_place_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=f"cannot write .*: {tmp_path}/file is no directory"):
        build(checkpoint, tmp_path / "file" / "engine", BuildOptions())


def broken(change: Callable[[Arrays], object]) -> Arrays:
    arrays = llama_tensors()
    change(arrays)
    return arrays


def test_a_weight_that_cannot_be_quantized(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    arrays = broken(lambda a: a[name].__setitem__((3, 4), np.nan))
    checkpoint = save_llama(tmp_path / "checkpoint", arrays)
    with pytest.raises(CheckpointError, match=f"{name} holds infinite or undefined numbers"):
        build(checkpoint, tmp_path / "engine", BuildOptions(quantization="int8_wo"))
    assert list(tmp_path.iterdir()) == [checkpoint]


NOT_NUMBERS = {
    "embed_tokens.weight": np.inf,
    "model.norm.weight": np.nan,
    "layers.1.self_attn.k_proj.weight": -np.inf,
}


@pytest.mark.parametrize("name", NOT_NUMBERS)
def test_weights_that_are_no_numbers_are_found(tmp_path: Path, name: str) -> None:
    """In a dense engine, which no quantization looks through."""

    def change(arrays: Arrays) -> None:
        full = next(n for n in arrays if n.endswith(name))
        arrays[full].flat[-1] = NOT_NUMBERS[name]

    checkpoint = save_llama(tmp_path / "checkpoint", broken(change))
    with pytest.raises(CheckpointError, match=rf"{name} holds infinite or undefined .* values"):
        build(checkpoint, tmp_path / "engine", BuildOptions())


@pytest.mark.parametrize("content", ["{}", "ab", "[" * 100_000, '{"version": "1.0", "model": {}}'])
def test_a_tokenizer_that_cannot_be_read_is_found_before_the_weights(
    tmp_path: Path, content: str
) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    (checkpoint / "tokenizer.json").write_text(content)
    told: list[int] = []
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        build(checkpoint, tmp_path / "engine", BuildOptions(), lambda *_: told.append(0))
    assert not told and list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", broken(lambda a: a.pop(name)))
    with pytest.raises(CheckpointError, match=f"has no tensor '{name}'"):
        plan(checkpoint, BuildOptions())


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("vocab_size", 300, "model.embed_tokens.weight"),
        ("hidden_size", 64, "model.embed_tokens.weight"),
        ("intermediate_size", 192, "model.layers.0.mlp.gate_proj.weight"),
        ("num_key_value_heads", 1, "model.layers.0.self_attn.k_proj.weight"),
        ("head_dim", 64, "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_configuration_of_another_model(
    tmp_path: Path, key: str, value: int, tensor: str
) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors(), **{key: value})
    with pytest.raises(CheckpointError, match=f"tensor {tensor} has shape .* by the configuration"):
        plan(checkpoint, BuildOptions())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_tensor_may_be_of_any_float_type(tmp_path: Path, dtype: type) -> None:
    arrays: Arrays = {
        name: array.astype(dtype) for name, array in llama_tensors(attention_bias=True).items()
    }
    for layer in range(2):
        for x, rows in zip("qkvo", (128, 64, 64, 128), strict=True):
            arrays[f"model.layers.{layer}.self_attn.{x}_proj.bias"] = np.ones(rows, dtype)
    checkpoint = save_llama(tmp_path / "checkpoint", arrays, attention_bias=True)
    quantizations: tuple[Quantization, ...] = ("none", "int4_wo")
    for quantization in quantizations:
        options = BuildOptions(quantization=quantization)
        build(checkpoint, tmp_path / quantization, options)


MEASURE = """
import os, re, sys
from pathlib import Path
from slipstream.builder.build import build, plan
from slipstream.builder.options import BuildOptions, Quantization
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])  # each core has an arena of its own
options = BuildOptions(quantization=sys.argv[3])
planned = plan(sys.argv[1], options)
def peak():  # ru_maxrss would count what the parent had before it started this process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
before = peak()
build(sys.argv[1], Path(sys.argv[2]), options)
print(planned.weight_bytes, peak() - before)
assert not {"torch", "transformers", "onnxruntime"} & set(sys.modules), "a heavy import"
"""


@pytest.mark.parametrize("quantization", ["none", "int4_wo"])
def test_a_build_needs_the_memory_of_a_few_layers_and_no_torch(
    big_checkpoint: Path, tmp_path: Path, quantization: str
) -> None:
    arguments = [sys.executable, "-c", MEASURE, str(big_checkpoint), str(tmp_path / "e")]
    done = subprocess.run([*arguments, quantization], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert weights > 50 << 20
    assert peak < 2.5 * LAYER_BYTES


# One layer as the float32 that a dense engine holds; the whole is eight times that.
LAYER_BYTES = 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816)


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB of float16 in 8 layers."""
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    arrays = {name: array.astype(np.float16) for name, array in llama_tensors(**shape).items()}
    return save_llama(tmp_path_factory.mktemp("big"), arrays, **shape)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_broken_chat_template_is_found_before_the_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = save_llama(tmp_path / "model", llama_tensors())
    (source / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{% for"}]
    broken = "{% for x in %}" if where.endswith("jinja") else json.dumps({"chat_template": named})
    (source / where).write_text(broken)
    monkeypatch.setattr(build_module, "write_weights", None)

    with pytest.raises(CheckpointError, match=r"not valid Jinja \(.*\); correct chat_template\."):
        build(source, tmp_path / "engine", BuildOptions())
    assert not (tmp_path / "engine").exists()


def test_special_tokens_of_every_file_survive_a_build(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model", llama_tensors())
    (source / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    build(source, tmp_path / "engine", BuildOptions())
    copied = tmp_path / "engine" / "special_tokens_map.json"
    assert copied.read_text() == '{"pad_token": "<|im_end|>"}'
    assert "special_tokens_map.json" in open_engine(tmp_path / "engine").manifest.files
