"""Plans by tensorrt_rtx, which makes them without a GPU: kernels, bindings, sizes, refusals."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx.inliner import inline_local_functions
from tests.quantized_models import Scheme, float8, integers, quantized_llama
from tests.tiny_models import LLAMA, llama_tensors, save_llama

from slipstream.builder.build import Plan, build, compile_checkpoint, plan
from slipstream.builder.engine import GRAPH, PLANS, WEIGHTS, EngineLimits, open_engine
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.tensorrt import plans
from slipstream.builder.targets.tensorrt.layers import Layer, count_products, read_layers, unpackers
from slipstream.builder.targets.tensorrt.plans import PlanSource, make_plans, plan_sources
from slipstream.builder.weight_file import write_weights
from slipstream.errors import BuildError
from slipstream.plugins.cuda.tensorrt import module_of

pytestmark = pytest.mark.skipif(module_of("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
LIMITS = EngineLimits(max_batch_size=8, max_num_tokens=64, max_seq_len=128)
# Products of a layer by kernel and type of codes.
FORMATS: dict[str, tuple[dict[str, Any], Scheme | None, dict[str, int]]] = {
    "bf16": ({}, None, {"runtime_fusion BFloat16": 2, "gemm BFloat16": 2}),
    "fp16": ({"dtype": "float16"}, None, {"runtime_fusion Half": 2, "gemm Half": 2}),
    "int8": ({"quantization": "int8_wo"}, None, {"runtime_fusion Int8": 4}),
    "fp8": ({"quantization": "fp8"}, None, {"runtime_fusion FP8": 4}),
    "int4": ({"quantization": "int4_wo", "group_size": 32}, None, {"runtime_fusion Int4": 4}),
    "w8a8": ({}, integers(8, activation="static"), {"gemm Int8": 4}),
    "fp8-w8a8": ({}, float8(activation="static"), {"gemm FP8": 4}),
}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for one GPU are made in half the time."""
    monkeypatch.setattr(plans, "RTX_GPUS", (89,))


def compiled(directory: Path, name: str) -> Plan:
    options, scheme, _ = FORMATS[name]
    given = BuildOptions(target="tensorrt", **options)
    if scheme is not None:
        return compile_checkpoint(quantized_llama({"_proj": scheme}), given)
    return plan(save_llama(directory / "checkpoint", llama_tensors()), given)


def lay_out(planned: Plan, directory: Path) -> dict[str, PlanSource]:
    """Write the weights, and say in the graph where they lie."""
    places = write_weights(directory / WEIGHTS, planned.weights, lambda _: None)
    for name, (offset, length) in places.items():
        value = planned.program.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, length, value.dtype, shape=value.shape, name=name, base_dir=directory,
        )  # fmt: skip
    return plan_sources(planned.program.model)


def make(source: PlanSource, directory: Path, gpus: tuple[int, ...] = (89,)) -> dict[str, Any]:
    return plans._make(source, LIMITS, "tensorrt_rtx", gpus, directory)


def layers_of(report: dict[str, Any]) -> list[Layer]:
    return read_layers(report["table"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("int4", "fp8-w8a8") else pytest.mark.slow)
        for name in FORMATS
    ],
)
def test_every_product_of_a_layer_is_one_kernel(tmp_path: Path, name: str) -> None:
    planned = compiled(tmp_path, name)
    source = lay_out(planned, tmp_path)["layer.1"]
    report = make(source, tmp_path)
    layers = layers_of(report)
    assert count_products(layers) == FORMATS[name][2]
    assert not unpackers(layers)
    if name == "int4":
        assert all("Int4" in layer.constants for layer in layers if layer.is_product)
    assert {layer.profile for layer in layers} == {0, 1}  # decodes, and every step
    assert report["unread"] == []
    plan_file = tmp_path / source.file
    written = plan_file.read_bytes()
    assert struct.unpack_from("<Q", written, 16) == (len(written),)
    held = [value for index in source.constants if (value := source.call.inputs[index])]
    constants = sum(v.const_value.nbytes for v in held if v.const_value is not None)
    # Each profile has code of its own, and of each product; weights are there once.
    assert constants < len(written) < constants + (2 << 20)
    weights = {
        str(v.name) for i, v in enumerate(source.function.inputs) if i not in source.constants
    }
    assert set(report["inputs"]) == weights


@pytest.mark.slow
def test_a_plan_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    source = lay_out(compiled(tmp_path, "bf16"), tmp_path)["tail.3"]
    written = []
    for _ in range(2):
        make(source, tmp_path)
        written.append((tmp_path / source.file).read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("name", "runs", "refused"),
    [
        pytest.param("bf16", 80, 75, marks=pytest.mark.slow),
        pytest.param("int4", 121, 75, marks=pytest.mark.slow),
        ("fp8", 120, 86),
    ],
)
def test_gpus_that_have_no_kernel_are_refused(
    tmp_path: Path, name: str, runs: int, refused: int
) -> None:
    source = lay_out(compiled(tmp_path, name), tmp_path)["head.0"]
    make(source, tmp_path, (runs,))
    with pytest.raises(BuildError, match=r"TensorRT made no head.*HW-specific"):
        make(source, tmp_path, (refused,))


# Which nodes of a model the parser takes, without being told where it was cut: on stdout.
ORACLE = """
import json, sys, tensorrt_rtx_bindings as trt
log = trt.Logger(trt.Logger.INTERNAL_ERROR)
typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
builder = trt.Builder(log)
network = builder.create_network(typed)
parser = trt.OnnxParser(network, log)
parser.supports_model_v2(open(sys.argv[1], "rb").read(), sys.argv[1])
print(json.dumps([parser.get_subgraph_nodes(i) for i in range(parser.num_subgraphs)]))
"""


@pytest.mark.parametrize("name", [pytest.param("bf16", marks=pytest.mark.slow), "int4"])
def test_the_parser_parts_the_graph_where_we_do(tmp_path: Path, name: str) -> None:
    planned = compiled(tmp_path, name)
    lay_out(planned, tmp_path)
    file = tmp_path / GRAPH
    ir.save(planned.program.model, file)
    inlined = inline_local_functions(onnx.load(file, load_external_data=False))
    onnx.save(inlined, file)
    command = [sys.executable, "-c", ORACLE, str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = json.loads(told[told.index("[[") :])
    assert len(parts) == LLAMA["num_hidden_layers"] + 1
    taken = {index for part in parts for index in part}
    left = [n.op_type for i, n in enumerate(inlined.graph.node) if i not in taken]
    assert left == ["PagedAttention"] * LLAMA["num_hidden_layers"]


def test_what_the_parser_refuses_is_told(tmp_path: Path) -> None:
    """Of a node that no parser knows: nothing is left behind."""
    source = lay_out(compiled(tmp_path, "bf16"), tmp_path)["tail.3"]
    graph = source.function.graph.clone()
    alien = ir.node("PagedAttention", [graph.inputs[0]], domain="slipstream", num_outputs=1)
    alien.outputs[0].name = "alien"
    graph.append(alien)
    function = ir.Function("slipstream.segments", "tail", graph=graph, attributes=[])
    with pytest.raises(BuildError, match=r"made no tail\.plan: .*[Pp]lugin.*use another"):
        make(replace(source, function=function), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {"checkpoint", WEIGHTS}


@pytest.mark.usefixtures("one_gpu")
def test_an_engine_says_what_made_its_plans_and_that_nobody_ran_them(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    limits = {"max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 128}
    options = BuildOptions(target="tensorrt", **limits)  # type: ignore[arg-type]
    build(checkpoint, tmp_path / "engine", options)
    engine = open_engine(tmp_path / "engine")
    engine.verify_files()
    made = engine.manifest.plans
    assert made is not None
    assert (made.flavour, made.gpus) == ("tensorrt_rtx", ("sm_89",))
    assert "never seen" in made.unverified
    assert set(made.calls.values()) <= set(engine.manifest.files)
    told = json.loads((engine.path / PLANS).read_text())
    assert told.keys() == set(made.calls.values())
    assert told["tail.plan"]["outputs"] == {
        "logits": {"dtype": "FLOAT", "shape": [-1, LLAMA["vocab_size"]]}
    }


def test_make_plans_names_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan serves all layers; what TensorRT does is left out."""
    planned = compiled(tmp_path, "bf16")
    report = {"version": "1", "inputs": {}, "outputs": {}, "table": ""}
    monkeypatch.setattr(plans, "_make", lambda *_: report)
    made = make_plans(planned.program.model, LIMITS, "sm_89", tmp_path)
    assert made.calls == {
        "head.0": "head.plan", "layer.1": "layer.plan", "last.2": "last.plan",
        "tail.3": "tail.plan",
    }  # fmt: skip
    assert made.gpus == ("sm_89", "sm_120", "sm_121")
