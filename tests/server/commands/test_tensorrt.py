"""What reports say of an engine whose layers are TensorRT's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.tensorrt_segments import without_tensorrt
from tests.tiny_models import LLAMA, llama_tensors, save_llama

from slipstream.builder.build import build
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import EngineMismatchError
from slipstream.plugins.operators import PRODUCTS
from slipstream.server.cli import slipstream
from slipstream.server.engine_summary import count_kernels, read_graph

LAYERS = LLAMA["num_hidden_layers"]
OPTIONS = ["--target", "tensorrt", "--quantization", "int4_wo", "--group-size", "32"]
KERNELS = {"TensorRT int4, groups of 32": 4 * LAYERS, "TensorRT bfloat16": 1}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "checkpoint", llama_tensors())


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_tensorrt(monkeypatch)
    options = BuildOptions(target="tensorrt", quantization="int4_wo", group_size=32)
    build(checkpoint, tmp_path / "engine", options)
    return tmp_path / "engine"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(slipstream, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_estimate_needs_no_tensorrt(checkpoint: Path) -> None:
    told = " ".join(run("build", str(checkpoint), "--estimate", *OPTIONS).split())
    assert f"TensorRT int4, groups of 32 {4 * LAYERS}" in told


def test_inspect_says_what_was_never_run(engine: Path) -> None:
    told = " ".join(run("inspect", str(engine), "--verify").split())
    assert "plans 4 for 4 calls, by tensorrt_rtx 1.7.1.116, for sm_89, sm_120" in told
    assert "unverified its TensorRT plans were made and inspected without a GPU" in told
    raw = json.loads(run("inspect", str(engine), "--json"))
    assert raw["linear_kernels"] == KERNELS
    assert raw["plans"]["unverified"] == open_engine(engine).manifest.plans.unverified  # type: ignore[union-attr]
    assert raw["operators"]["slipstream.segments.head"] == 1


def test_a_plan_without_a_hash_is_found(engine: Path) -> None:
    manifest = json.loads((engine / "engine.json").read_text())
    del manifest["files"]["tail.plan"]
    (engine / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineMismatchError, match=r"tail\.plan .* has no hash"):
        open_engine(engine).verify_files()


def test_metadata_that_no_build_writes(engine: Path) -> None:
    graph = read_graph(open_engine(engine))
    next(iter(graph)).metadata_props[PRODUCTS] = '{"int4": "many"}'
    with pytest.raises(EngineMismatchError, match=r"no readable slipstream\.products"):
        count_kernels(graph)


@pytest.mark.parametrize("option", [["--tune"], ["--kernels", "sm_90"]])
def test_options_of_our_own_kernels(checkpoint: Path, tmp_path: Path, option: list[str]) -> None:
    arguments = ["build", str(checkpoint), "-o", str(tmp_path / "x"), *OPTIONS, *option]
    result = CliRunner().invoke(slipstream, arguments)
    assert result.exit_code == 2
    assert "is for target cuda and the target is tensorrt" in result.output
