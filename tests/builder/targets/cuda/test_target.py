"""What the cuda target makes of a model; its kernels are tested where they are."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from tests.integration.test_architectures import CONFIGS
from tests.quantized_models import (
    MemoryCheckpoint,
    Scheme,
    float4,
    float8,
    integers,
    nf4,
    quantized_llama,
    with_input,
)
from tests.tiny_models import LLAMA, llama_tensors, save_llama, save_tiny

from slipstream.builder.build import Plan, build, compile_checkpoint, plan
from slipstream.builder.contract import kv_dtype_of, page_size_of
from slipstream.builder.engine import open_engine
from slipstream.builder.graph.describe import describe_format
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.plugins.cuda.standard import BINDINGS
from slipstream.plugins.linear.cuda.packing import format_of, unpack
from slipstream.weights.fp8 import quantize_fp8
from slipstream.weights.rtn import quantize_rtn
from slipstream.weights.tensor import KVScales, LazyTensor, QuantTensor, WeightFormat

LAYERS = LLAMA["num_hidden_layers"]


def planned(directory: Path, **options: Any) -> Plan:  # noqa: ANN401
    return plan(save_llama(directory, llama_tensors()), BuildOptions(target="cuda", **options))


def weights(compiled: Plan) -> dict[str, QuantTensor]:
    """What the blobs of all linears and embeddings hold, by the weight's name."""
    found = {}
    for node in compiled.program.graph:
        if node.op_type in ("Linear", "Embedding"):
            value = node.inputs[1]
            assert value is not None and value.name is not None
            (blob,) = compiled.program.stored[value.name].load()
            values = {a.name: a.value for a in node.attributes.values()}
            fmt = format_of({"zero_kind": 0, "scale_bytes": 4, **values})
            found[value.name.removesuffix(".cuda")] = unpack(blob.view(np.uint8), fmt)
    return found


@pytest.mark.parametrize("quantization", ["none", "fp8", "int4_wo", "int8_wo"])
def test_a_layer_is_five_kernels(tmp_path: Path, quantization: str) -> None:
    graph = planned(tmp_path, quantization=quantization).program.graph
    assert Counter(node.op_type for node in graph) == {
        "RotaryAngles": 1,
        "Embedding": 1,
        "Linear": 4 * LAYERS + 1,
        "PagedAttention": LAYERS,
        "Gather": 1,
    }
    linears = [node for node in graph if node.op_type == "Linear"]
    fused = [
        ("norm" if len(n.inputs) > 4 else "residual", "gated" in n.attributes) for n in linears
    ]
    layer = [("norm", False), ("residual", False), ("norm", True), ("residual", False)]
    assert fused == [*layer * LAYERS, ("norm", False)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_but_logits_and_angles_has_the_dtype(tmp_path: Path, dtype: Any) -> None:  # noqa: ANN401
    compiled = planned(tmp_path, dtype=dtype)
    kinds = {
        node.op_type: {value.dtype for value in node.outputs}
        for node in compiled.program.graph
        if not node.outputs[0].is_graph_output()
    }
    narrow = ir.DataType[dtype.upper()]
    assert kinds.pop("RotaryAngles") == {ir.DataType.FLOAT}
    assert set().union(*kinds.values()) == {narrow}
    assert compiled.program.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert kv_dtype_of(compiled.caches) == dtype


@pytest.mark.parametrize(
    "name",
    ["qwen2-moe", "qwen2-moe-dense-layers", "olmoe-clipped", "granitemoeshared", "glm4-moe"],
)
def test_families_with_experts_build(name: str, tmp_path: Path) -> None:
    """Of ONNX's own operators they have those alone that the executor knows; what decides between
    experts is float32."""
    graph = plan(save_tiny(CONFIGS[name], tmp_path), BuildOptions(target="cuda")).program.graph
    counts = Counter(node.op_type for node in graph)
    assert {node.op_type for node in graph if not node.domain} <= BINDINGS.keys()
    routers = [node for node in graph if node.op_type in ("Router", "NormedRouter")]
    assert 2 * len(routers) == counts["ExpertLinear"] > 0
    apart = [node for node in routers if node.op_type == "Router"]
    decides = [value for node in apart for value in node.inputs]
    decides += [node.inputs[4] for node in routers if node.op_type == "NormedRouter"]
    decides += [node.outputs[-1] for node in routers]
    assert {value.dtype for value in decides if value is not None} == {ir.DataType.FLOAT}
    residuals = [n for n in graph if n.op_type == "ExpertLinear" and len(n.inputs) == 6]
    assert len(residuals) == len(routers)


def test_dense_weights_are_stored_in_the_dtype(tmp_path: Path) -> None:
    arrays = llama_tensors()
    found = weights(planned(tmp_path))
    name = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(found[name].codes, arrays[name].astype(ml_dtypes.bfloat16))
    gate, up = (arrays[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    both = found["model.layers.0.mlp.gate_proj+up_proj.weight"]
    np.testing.assert_array_equal(both.codes, np.concatenate([gate, up]).astype(ml_dtypes.bfloat16))


def test_quantized_weights_are_those_of_the_quantizer(tmp_path: Path) -> None:
    arrays = llama_tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    form = WeightFormat(arrays[name].shape)
    dense = LazyTensor(name, form, lambda: QuantTensor(name, form, arrays[name]))
    wanted = {
        "fp8": quantize_fp8(dense),
        "int4_wo": quantize_rtn(dense, bits=4, group_size=128, symmetric=False),
        "int8_wo": quantize_rtn(dense, bits=8, group_size=128, symmetric=False),
    }
    for quantization, want in wanted.items():
        found = weights(planned(tmp_path, quantization=quantization))
        np.testing.assert_array_equal(found[name].dequantize(), want.dequantize())
        assert found["model.embed_tokens.weight"].format.kind == (
            "dense" if quantization == "fp8" else "int"
        )


@pytest.mark.parametrize(
    ("options", "capability"),
    [
        ({}, "sm_80"),
        ({"quantization": "int4_wo"}, "sm_80"),
        ({"quantization": "fp8"}, "sm_89"),
        ({"kv_cache_dtype": "fp8"}, "sm_89"),
    ],
)
def test_the_manifest_says_which_gpu_is_old_enough(
    tmp_path: Path, options: dict[str, Any], capability: str
) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda", **options))
    manifest = open_engine(tmp_path / "engine").manifest
    assert (manifest.target, manifest.capability) == ("cuda", capability)
    assert (manifest.limits.max_batch_size, manifest.limits.max_num_tokens) == (1024, 8192)
    assert page_size_of(manifest.caches) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cuda", "kv_cache_dtype": "int8"}, "kv_cache_dtype int8 does not run on tar"),
        ({"target": "cuda", "kv_cache_dtype": "k16v8"}, "kv_cache_dtype k16v8 does not run on"),
        ({"target": "cuda", "dtype": "float32"}, "dtype float32 does not run on target cuda; use"),
        ({"target": "cuda", "gemm_plugin": "disable"}, "gemm_plugin disable is for target cpu"),
        ({"target": "cpu", "quantization": "fp8"}, "quantization fp8 does not run on target cpu"),
        (
            {"target": "cpu", "kv_cache_dtype": "bfloat16"},
            "kv_cache_dtype bfloat16 does not run on",
        ),
    ],
)
def test_what_a_target_does_not_run_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    with pytest.raises(BuildError, match=message):
        plan(checkpoint, BuildOptions(**options))


@pytest.mark.parametrize("head_dim", [20, 520])
def test_heads_that_the_kernels_cannot_run_are_refused(tmp_path: Path, head_dim: int) -> None:
    checkpoint = save_llama(tmp_path, llama_tensors(head_dim=head_dim), head_dim=head_dim)
    with pytest.raises(BuildError, match=f"heads of {head_dim} elements; the cuda target runs"):
        plan(checkpoint, BuildOptions(target="cuda"))


HELD: dict[str, tuple[Scheme, str]] = {
    "ragged groups": (integers(4, 128, "zero"), "int4, groups of 64, zero points"),
    "zero points of 16": (integers(4, 64, "zero", beyond=True), "int4, groups of 64, zero points"),
    "offsets": (integers(8, 32, "offset", dtype="float32"), "int8, groups of 32, offsets"),
    "int4 rows": (integers(4), "int4, groups of 64"),
    "int4 with rounded x": (integers(4, 64, activation="token"), "int4, groups of 64"),
    "int8 rows": (
        integers(8, activation="token"),
        "int8, a scale a row, activations rounded by token",
    ),
    "int8 static": (
        integers(8, activation="static", dtype="bfloat16"),
        "int8, a scale a row, activations rounded by a fixed scale",
    ),
    "float8 weight-only": (float8(activation="none"), "float8_e4m3, a scale a row"),
    "float8 static": (
        float8(activation="static"),
        "float8_e4m3, a scale a row, activations rounded by a fixed scale",
    ),
    "float8 blocks": (
        float8(128, 128, activation="group"),
        "float8_e4m3, blocks of 128x128, activations rounded by token and group",
    ),
    "act-order": (with_input(integers(4, 64, "zero"), order=1), "int4, groups of 64, zero points"),
}


def compiled(checkpoint: MemoryCheckpoint) -> Plan:
    return compile_checkpoint(checkpoint, BuildOptions(target="cuda"))


def stored(checkpoint: MemoryCheckpoint, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The numbers of a weight's codes, of one that several were fused into too."""
    module, _, rest = name.rpartition(".self_attn.")
    names = [f"{module}.self_attn.{part}" for part in rest.split("+")] if module else [name]
    if not module:
        module, _, rest = name.rpartition(".mlp.")
        names = [f"{module}.mlp.{part}" for part in rest.split("+")] if module else [name]
    names = [each if each.endswith(".weight") else f"{each}.weight" for each in names]
    parts = [replace(checkpoint.tensors[each], input=None).dequantize() for each in names]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", HELD)
def test_schemes_of_checkpoints_stay_what_they_are(name: str) -> None:
    scheme, form = HELD[name]
    checkpoint = quantized_llama({"proj": scheme}, num_hidden_layers=1)
    found = weights(compiled(checkpoint))
    linears = {key: tensor for key, tensor in found.items() if "proj" in key}
    # Blocks of 128 rows cannot be stacked where rows of a block are missing.
    assert len(linears) == (7 if "blocks" in form else 4)
    for key, tensor in linears.items():
        assert describe_format(tensor.format) == form
        np.testing.assert_array_equal(tensor.dequantize(), stored(checkpoint, key))


@pytest.mark.parametrize("scheme", [nf4, float4, integers(8, 16)], ids=["nf4", "nvfp4", "16"])
def test_what_no_kernel_holds_is_dense_and_named(
    scheme: Scheme, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = quantized_llama({"proj": scheme}, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        found = weights(compiled(checkpoint))
    kind = describe_format(checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].format)
    assert caplog.messages == [
        "7 weights (model.layers.0.self_attn.q_proj.weight, …): target cuda has no kernel for "
        f"{kind}; they become bfloat16"
    ]
    for key in (key for key in found if "proj" in key):
        want = stored(checkpoint, key).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found[key].codes, want)


def test_calibrated_kv_scales_reach_the_attention_of_their_layer() -> None:
    scales = KVScales((0.5, 0.25), (0.125, 2.0))
    planned = compiled(quantized_llama({}, kv_scales=scales))
    found = [
        tuple(node.attributes[f"{name}_scale"].as_float() for name in "kv")
        for node in planned.program.nodes("PagedAttention")
    ]
    assert found == [(0.5, 0.125), (0.25, 2.0)]
    assert (kv_dtype_of(planned.caches), planned.capability) == ("float8_e4m3fn", "sm_89")
