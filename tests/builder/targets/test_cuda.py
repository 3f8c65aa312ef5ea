"""What the cuda target makes of a model; its kernels are tested where they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from tests.tiny_models import LLAMA, llama_tensors, save_llama

from slipstream.builder.build import Plan, build, plan
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.plugins.linear.cuda_packing import format_of, unpack
from slipstream.quantize.fp8 import quantize_fp8
from slipstream.quantize.rtn import quantize_rtn
from slipstream.quantize.tensor import LazyTensor, QuantTensor, WeightFormat

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
    assert compiled.kv.dtype == dtype


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
    assert (manifest.limits.max_batch_size, manifest.limits.max_num_tokens) == (256, 8192)
    assert manifest.kv.page_size == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cuda", "kv_cache_dtype": "int8"}, "kv_cache_dtype int8 does not run on tar"),
        ({"target": "cuda", "dtype": "float32"}, "dtype float32 does not run on target cuda; use"),
        ({"target": "cuda", "gemm_plugin": "disable"}, "gemm_plugin disable is for target cpu"),
        ({"target": "cpu", "quantization": "fp8"}, "quantization fp8 does not run on target cpu"),
        ({"target": "cpu", "dtype": "bfloat16"}, "dtype bfloat16 does not run on target cpu; use"),
        ({"target": "cpu", "kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8 does not run on target c"),
    ],
)
def test_what_a_target_does_not_run_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    checkpoint = save_llama(tmp_path / "checkpoint", llama_tensors())
    with pytest.raises(BuildError, match=message):
        plan(checkpoint, BuildOptions(**options))


@pytest.mark.parametrize("head_dim", [20, 264])
def test_heads_that_the_kernels_cannot_run_are_refused(tmp_path: Path, head_dim: int) -> None:
    checkpoint = save_llama(tmp_path, llama_tensors(head_dim=head_dim), head_dim=head_dim)
    with pytest.raises(BuildError, match=f"heads of {head_dim} elements; the cuda target runs"):
        plan(checkpoint, BuildOptions(target="cuda"))
