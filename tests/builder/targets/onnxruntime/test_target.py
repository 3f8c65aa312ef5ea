"""What the canonical graph becomes for ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slipstream.builder.build import Plan, build, plan
from slipstream.builder.contract import Source
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions, Dtype, OrtAttention
from slipstream.errors import BuildError


def planned(checkpoint: Path, **options: Any) -> Plan:  # noqa: ANN401
    return plan(checkpoint, BuildOptions(target="onnxruntime", **options))


def operators(program: Plan) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in program.program.graph)


def test_a_layer_in_slots(tiny_checkpoint: Path) -> None:
    """Nothing of ours is left, and nothing that a step does not need."""
    made = planned(tiny_checkpoint, dtype="float32", max_seq_len=100)
    counts = operators(made)
    assert counts["com.microsoft", "GroupQueryAttention"] == 3
    assert counts["com.microsoft", "SkipSimplifiedLayerNormalization"] == 5
    assert counts["", "Gemm"] == 3 * 4 + 1
    assert {domain for domain, _ in counts} == {"", "com.microsoft"}
    assert "slipstream" not in made.program.graph.opset_imports
    (cache,) = made.caches
    assert (cache.page_size, cache.arrays[0].shape) == (101, (2, 101, 16))
    ports = made.graphs["target"].inputs
    assert [p.name for p in ports if p.source is Source.LAYER][:3] == [
        "key_cache.0", "value_cache.0", "key_cache.1",
    ]  # fmt: skip
    assert {p.name for p in ports if p.source is not Source.LAYER} == {
        "token_ids", "context_len", "longest_context", "logits_rows",
    }  # fmt: skip
    updated = {o.updates for o in made.graphs["target"].outputs if o.updates}
    assert updated == {p.name for p in ports if p.source is Source.LAYER}


def test_a_layer_in_pages(tiny_checkpoint: Path) -> None:
    made = planned(tiny_checkpoint, dtype="float16", ort_attention="pages")
    assert operators(made)["com.microsoft", "PagedAttention"] == 3
    (cache,) = made.caches
    assert (cache.page_size, cache.arrays[1].shape) == (256, (256, 2, 16))
    node = made.program.nodes("PagedAttention")[1]
    names = [None if value is None else value.name for value in node.inputs]
    assert names[1:6] == [None, None, "key_cache.1", "value_cache.1", "query_start"]
    assert names[7] == "page_table"
    assert {p.name for p in made.graphs["target"].inputs if p.source is not Source.LAYER} == {
        "token_ids", "query_start", "context_len", "page_table", "logits_rows",
    }  # fmt: skip


def test_lengths_before_a_step_over_pages(tiny_checkpoint: Path) -> None:
    """What PagedAttention is told of the past, computed from what a step has."""
    import onnxruntime as ort

    made = planned(tiny_checkpoint, dtype="float16", ort_attention="pages")
    graph = made.program.graph
    past = made.program.nodes("PagedAttention")[0].inputs[6]
    nodes = [node for node in graph if node.name and node.name.startswith("step/")]
    for node in nodes:
        graph.remove(node)
    assert past is not None

    def own(value: ir.Value) -> ir.Value:
        """The same value of another graph."""
        copy = ir.Value(
            name=value.name, shape=value.shape, type=value.type, const_value=value.const_value
        )
        value.replace_all_uses_with(copy)
        return copy

    inputs = [own(v) for v in graph.inputs if v.name in ("query_start", "context_len")]
    used = {v for node in nodes for v in node.inputs if v is not None and v.const_value is not None}
    constants = [own(value) for value in used]
    part = ir.Graph(inputs, [past], nodes=nodes, initializers=constants, opset_imports={"": 23})
    model = ir.to_proto(ir.Model(part, ir_version=11))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        "query_start": np.array([0, 1, 6, 7], np.int32),
        "context_len": np.array([10, 5, 300], np.int32),
    }
    assert session.run(None, feeds)[0].tolist() == [9, 0, 299]


@pytest.mark.parametrize(
    ("dtype", "attention", "capability"),
    [
        ("float32", "auto", "CPUExecutionProvider"),
        ("auto", "auto", "any"),
        ("float16", "pages", "CUDAExecutionProvider"),
        ("bfloat16", "slots", "CUDAExecutionProvider"),
    ],
)
def test_the_provider_that_has_all_kernels(
    dtype: Dtype,
    attention: OrtAttention,
    capability: str,
    tiny_checkpoint: Path,
) -> None:
    made = planned(tiny_checkpoint, dtype=dtype, ort_attention=attention)
    assert made.capability == capability
    kinds = {part.dtype.name for weight in made.weights for part in weight.parts}
    assert kinds == {"float16" if dtype == "auto" else dtype}, "one type throughout"
    logits = made.graphs["target"].outputs[0]
    assert (logits.name, logits.dtype) == ("logits", "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32", "ort_attention": "pages"}, "takes float16 and bfloat16"),
        ({"ort_activations": "int8"}, "rounds x in float32 only, and dtype is float16"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype int8 does not run on target onnxruntime"),
        ({"quantization": "fp8"}, "quantization fp8 does not run on target onnxruntime"),
        ({"gemm_plugin": "disable"}, "gemm_plugin disable does not run on target onnxruntime"),
        ({"tp_size": 2}, "tp_size 2 does not run on target onnxruntime; use one of 1"),
    ],
)
def test_options_that_mean_nothing_here(
    options: dict[str, Any], message: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(BuildError, match=message):
        planned(tiny_checkpoint, **options)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_other_targets_have_no_such_choices(target: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(BuildError, match="ort_attention pages does not run on target"):
        plan(tiny_checkpoint, BuildOptions(target=target, ort_attention="pages"))
    with pytest.raises(BuildError, match="ort_activations int8 does not run on target"):
        plan(tiny_checkpoint, BuildOptions(target=target, ort_activations="int8"))


def test_the_manifest_says_how_to_make_it_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(target="onnxruntime", dtype="bfloat16", ort_attention="pages")
    build(tiny_checkpoint, tmp_path / "engine", options)
    manifest = open_engine(tmp_path / "engine").manifest
    assert manifest.command.endswith("--target onnxruntime --dtype bfloat16 --ort-attention pages")
    assert manifest.plugins == {}
