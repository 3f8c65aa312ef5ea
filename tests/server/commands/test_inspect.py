from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from tests.tiny_models import LLAMA, save_llama

from slipstream.builder.build import build
from slipstream.builder.contract import KV, TARGET_GRAPH, bytes_per_token, page_size_of
from slipstream.builder.engine import digest, open_engine
from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.server.cli import slipstream


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["inspect", *map(str, arguments)])


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def test_json_is_the_manifest_and_what_the_files_hold(tiny_engine: Path) -> None:
    result = run(tiny_engine, "--json", "--verify")
    assert result.exit_code == 0, result.output
    report, manifest = json.loads(result.stdout), open_engine(tiny_engine).manifest
    assert report["model"] == manifest.model
    per_token = bytes_per_token(manifest.caches)
    assert report["kv"]["bytes_per_token"] == per_token == 2 * 3 * 2 * 16 * 4
    assert report["kv"] == {
        "dtype": "float32",
        "page_size": page_size_of(manifest.caches),
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 16,
        "bytes_per_token": per_token,
    }
    assert report["graphs"].keys() == {TARGET_GRAPH}
    assert [cache["name"] for cache in report["caches"]] == [KV]
    assert report["limits"]["max_seq_len"] == 512
    for file in report["files"]:
        path = tiny_engine / file["name"]
        assert (file["size"], file["sha256"]) == (path.stat().st_size, digest(path))
        assert file["status"] == "ok"
    with safe_open(tiny_engine / "weights.safetensors", "numpy") as weights:
        arrays = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert report["weights"]["count"] == len(arrays)
    assert report["weights"]["nbytes"] == sum(array.nbytes for array in arrays.values())
    counts = {name: part["count"] for name, part in report["weights"]["by_dtype"].items()}
    matrices = sum(name.endswith(".packed") for name in arrays)
    assert counts == {"U8": matrices, "F32": len(arrays) - matrices}
    biggest = report["weights"]["biggest"]
    assert biggest[0]["nbytes"] == max(array.nbytes for array in arrays.values())
    assert tuple(biggest[0]["shape"]) == arrays[biggest[0]["name"]].shape
    assert report["operators"]["slipstream.PagedAttention"] == 3
    assert report["linear_kernels"] == {
        "slipstream float32": report["operators"]["slipstream.Linear"]
    }


def test_text_shows_the_same_to_people(tiny_engine: Path) -> None:
    result = run(tiny_engine)
    assert result.exit_code == 0, result.output
    for words in ("llama", "max_seq_len", "KV per token", "768 B", "slipstream.PagedAttention"):
        assert words in result.stdout
    assert "weights.safetensors" in result.stdout and "not checked" in result.stdout


def test_verify_finds_a_changed_byte(engine: Path) -> None:
    tokenizer = engine / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    result = run(engine, "--verify")
    assert result.exit_code == 1
    assert "changed" in result.stdout
    assert result.stderr.startswith("error: tokenizer.json is changed; build the engine again: ")
    assert run(engine).exit_code == 0


def test_a_file_without_its_hash_is_found(engine: Path) -> None:
    manifest = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**manifest, "files": {}}))
    result = run(engine, "--json")
    assert result.exit_code == 1 and "graph.onnx is not listed" in result.stderr
    assert {file["status"] for file in json.loads(result.stdout)["files"]} == {"not listed"}


def test_a_missing_file_is_found_without_verify(engine: Path) -> None:
    (engine / "weights.safetensors").unlink()
    result = run(engine, "--json")
    assert result.exit_code == 1 and "weights.safetensors is missing" in result.stderr
    files = {file["name"]: file for file in json.loads(result.stdout)["files"]}
    assert files["weights.safetensors"]["status"] == "missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", b""),
        ("weights.safetensors", b"\xff" * 100),
        ("weights.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
        ("graph.onnx", b"\xff" * 100),
    ],
)
def test_a_damaged_file_is_one_error(engine: Path, name: str, content: bytes) -> None:
    (engine / name).write_bytes(content)
    result = run(engine)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {name} of the engine")
    assert result.stderr.count("\n") == 1


def test_what_is_no_engine(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1 and "is no engine" in result.stderr


def rewritten(engine: Path, edit: Callable[[ir.Graph], None]) -> Path:
    """The engine with another graph, of which its manifest has the hash."""
    opened = open_engine(engine)
    model = ir.load(engine / "graph.onnx")
    edit(model.graph)
    ir.save(model, engine / "edited.onnx")
    (engine / "edited.onnx").rename(engine / "graph.onnx")
    files = {**opened.manifest.files, "graph.onnx": digest(engine / "graph.onnx")}
    manifest = replace(opened.manifest, files=files)
    (engine / "engine.json").write_text(manifest.to_json())
    return engine


def attention(graph: ir.Graph) -> ir.Node:
    return next(node for node in graph if node.op_type == "PagedAttention")


def set_heads(value: int) -> Callable[[ir.Graph], None]:
    def edit(graph: ir.Graph) -> None:
        attention(graph).attributes["num_heads"] = ir.AttrInt64("num_heads", value)

    return edit


def move_weight(location: str, offset: int) -> Callable[[ir.Graph], None]:
    def edit(graph: ir.Graph) -> None:
        name, value = next(
            (name, value)
            for name, value in graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        )
        assert value.dtype is not None and value.shape is not None
        assert isinstance(value.const_value, ir.ExternalTensor)
        length = value.const_value.length
        value.const_value = ir.ExternalTensor(
            location, offset, length, value.dtype, shape=value.shape, name=name
        )  # fmt: skip

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_heads(2**60), "num_heads is 1152921504606846976, not 1 to 65536"),
        (set_heads(6), r"has qkv of shape .*, expected .* = 160"),
        (move_weight("../weights.safetensors", 0), "is not inside weights.safetensors"),
        (move_weight("weights.safetensors", 2**40), "is not inside weights.safetensors"),
        (move_weight("weights.safetensors", -64), "cannot be read"),
    ],
)
def test_verify_checks_the_graph_against_specs_manifest_and_weights(
    engine: Path, edit: Callable[[ir.Graph], None], message: str
) -> None:
    result = run(rewritten(engine, edit), "--verify")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert re.search(f"^error: graph.onnx of the engine .*{message}.*again: slip", result.stderr)


def test_experts_are_told_of_and_what_a_step_reads_of_them(tmp_path: Path) -> None:
    shape = {
        **LLAMA,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    }
    config = ModelConfig.from_huggingface(shape)
    arrays = {
        name: np.zeros(size, np.float32)
        for name, size in architecture_of("mixtral").shapes(config).items()
    }
    checkpoint = save_llama(tmp_path / "model", arrays, **shape)
    build(checkpoint, tmp_path / "engine", BuildOptions(quantization="int4_wo", group_size=32))
    report = json.loads(run(tmp_path / "engine", "--json").stdout)
    sizes = {w["name"]: w["nbytes"] for w in report["weights"]["biggest"]}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    (found,) = report["experts"]
    assert found == {"layers": 2, "experts": 6, "top_k": 2, "nbytes": experts}
    idle = 2 * 3 * 128 * 256 * 4
    assert report["parameters"]["total"] == report["parameters"]["active"] + idle
    embedding = next(size for name, size in sizes.items() if "embed_tokens" in name)
    read = report["weights"]["nbytes"] - embedding - experts + round(experts * 2 / 6)
    assert abs(report["weights"]["read_at_batch_1"] - read) < 1
    shown = run(tmp_path / "engine").stdout
    assert "2 of 6 for a token, in 2 layers" in shown
    assert "slipstream experts int4, groups of 32" in shown
    distinct = 6 * (1 - (1 - 2 / 6) ** 16)
    assert f"{distinct:.1f} experts a layer if chosen evenly" in shown
    estimated = (
        CliRunner()
        .invoke(slipstream, ["build", str(checkpoint), "--estimate", "--quantization", "int4_wo"])
        .stdout
    )
    assert "2 of 6 for a token, in 2 layers" in estimated and "read at batch 1 " in estimated
