"""What the tensorrt target makes of a model, before there are plans."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests.programs import evaluate
from tests.quantized_models import float4, float8, integers, quantized_llama, with_input
from tests.tensorrt_segments import run_function
from tests.tiny_models import LLAMA, llama_tensors, save_llama

from slipstream.builder.build import Plan, compile_checkpoint, plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.builder.engine import CONSTANT
from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.program import Program
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.tensorrt import TARGET, TensorRTTarget, check_runs, elementwise
from slipstream.builder.targets.tensorrt.linear import holds
from slipstream.builder.targets.tensorrt.plans import plan_sources
from slipstream.errors import BuildError
from slipstream.plugins.linear import ACTIVATIONS
from slipstream.plugins.operators import SEGMENTS
from slipstream.server.engine_summary import count_kernels, step_weights
from slipstream.weights.tensor import WeightFormat

LAYERS = LLAMA["num_hidden_layers"]
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": "float16"},
    "int8": {"quantization": "int8_wo", "dtype": "float16"},
    "fp8": {"quantization": "fp8", "dtype": "float16"},
    "int4": {"quantization": "int4_wo", "group_size": 32, "dtype": "float16"},
}


def planned(directory: Path, changes: dict[str, Any] | None = None, **options: Any) -> Plan:  # noqa: ANN401
    changes = changes or {}
    source = save_llama(directory, llama_tensors(**changes), **changes)
    return plan(source, BuildOptions(target="tensorrt", **options))


def test_a_graph_is_cut_at_attention_and_where_rows_are_picked(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 4}
    model = planned(tmp_path, changes).program.model
    attention = "PagedAttention"
    assert [node.op_type for node in model.graph] == [
        "head", attention, "layer", attention, "layer", attention, "layer", attention, "last",
        "Gather", "tail",
    ]  # fmt: skip
    functions = [function.name for function in model.functions.values()]
    assert functions == ["head", "layer", "last", "tail"]  # one for all layers
    operators = {node.domain for function in model.functions.values() for node in function}
    assert operators == {""}  # ONNX's own, which a parser without plugins takes
    files = [source.file for source in plan_sources(model).values()]
    assert files == ["head.plan", *["layer.plan"] * 3, "last.plan", "tail.plan"]


def test_weights_are_arguments_but_those_that_a_fused_kernel_must_know(tmp_path: Path) -> None:
    program = planned(tmp_path, quantization="int4_wo", group_size=32).program
    sources = plan_sources(program.model)
    assert [source.file for source in sources.values()] == [
        "head.0.plan", "layer.1.plan", "last.2.plan", "tail.plan",
    ]  # fmt: skip
    layer = sources["layer.1"]
    held = [str(layer.call.inputs[index].name) for index in layer.constants]  # type: ignore[union-attr]
    assert len(held) == 8  # codes and scales of four products
    assert all(name.endswith(CONSTANT) for name in held)
    assert {v.dtype for v in layer.call.inputs if v and v.name in held} == {
        ir.DataType.INT4, ir.DataType.BFLOAT16,
    }  # fmt: skip
    assert not sources["tail.3"].constants


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_of_a_function_has_a_type_of_its_own(tmp_path: Path, dtype: Any) -> None:  # noqa: ANN401
    """TensorRT converts nothing by itself: operators read numbers of one type."""
    model = planned(tmp_path, dtype=dtype).program.model
    wide = ir.DataType.FLOAT
    for function in model.functions.values():
        for node in function:
            if node.op_type in ("Cast", "Gather", "Constant", "Unsqueeze"):
                continue
            types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
            assert len(types) == 1, (function.name, node)
            assert node.op_type in ("Mul", "Sin", "Cos") or wide not in types
    assert model.graph.outputs[0].dtype == wide


def canonical(checkpoint: Checkpoint, options: BuildOptions, patch: pytest.MonkeyPatch) -> Program:
    """The program with the same weights, before it is lowered."""
    whole = TensorRTTarget.pipeline

    def first(self: TensorRTTarget, options: BuildOptions) -> tuple[Pass, ...]:
        passes = tuple(whole(self, options))
        return passes[: passes.index(elementwise.cast_outputs)]

    with patch.context() as patched:
        patched.setattr(TensorRTTarget, "pipeline", first)
        return compile_checkpoint(checkpoint, options).program


def step_inputs(program: Program, dtype: Any) -> dict[str, NDArray[Any]]:  # noqa: ANN401
    """Two sequences on pages of their own, one with a context of a page before."""
    (cache,) = program.caches
    pages = np.zeros((len(cache.layers), 3, *cache.arrays[0].shape), dtype)
    inputs = {
        "token_ids": [3, 40, 250, 17, 9],
        "positions": [0, 1, 2, 0, 1],
        "query_start": [0, 3, 5],
        "context_len": [3, 2],
        "page_table": [[1], [2]],
        "slot_mapping": [64, 65, 66, 128, 129],
        "logits_rows": [2, 4],
    }
    return {**{n: np.array(v, np.int32) for n, v in inputs.items()}, "kv_cache": pages}


def lowered_logits(program: Program, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """What a cut program gives: functions by ONNX's evaluator, the rest by our references."""
    known: dict[str, Any] = dict(inputs)
    for stored in program.stored.values():
        for part, array in zip(stored.parts, stored.load(), strict=True):
            value = program.graph.initializers[part.name]
            known[part.name] = int4(array) if value.dtype == ir.DataType.INT4 else array
    functions = {function.name: function for function in program.model.functions.values()}
    for node in program.graph:
        given = [None if value is None else known[str(value.name)] for value in node.inputs]
        if node.domain == SEGMENTS:
            results = run_function(functions[node.op_type], given)  # type: ignore[arg-type]
        elif node.op_type == "PagedAttention":
            results = [attend(node, given).astype(given[0].dtype)]  # type: ignore[union-attr]
        else:
            results = [given[0][given[1]]]  # type: ignore[index]
        known |= {str(v.name): r for v, r in zip(node.outputs, results, strict=True)}
    logits: NDArray[np.float32] = known["logits"]
    return logits


def attend(node: ir.Node, given: list[Any]) -> NDArray[Any]:
    """A PagedAttention node by its reference."""
    inputs = [ir.Value(name=f"input_{index}") for index in range(len(given))]
    copy = ir.node("PagedAttention", inputs, node.attributes, domain="slipstream", num_outputs=1)
    copy.outputs[0].name = "y"
    program = Program(ir.Model(ir.Graph([], [], nodes=[copy]), ir_version=11))
    known = {str(value.name): array for value, array in zip(inputs, given, strict=True)}
    return np.asarray(evaluate(program, known)["y"])


def int4(packed: NDArray[Any]) -> NDArray[Any]:
    low, high = packed & 15, packed >> 4
    codes = np.stack([low, high], axis=-1).reshape(len(packed), -1).astype(np.int8)
    return np.where(codes > 7, codes - 16, codes).astype(ml_dtypes.int4)


def assert_same_logits(
    checkpoint: Checkpoint, patch: pytest.MonkeyPatch, options: BuildOptions, error: float
) -> None:
    before = canonical(checkpoint, options, patch)
    for node in before.nodes("Linear"):  # whose x a CPU would round in a way of its own
        number = ACTIVATIONS[before.weight_of(node).format.activation]
        node.attributes["activation"] = ir.AttrInt64("activation", number)
    after = compile_checkpoint(checkpoint, options).program
    wanted = evaluate(before, step_inputs(before, np.float32))["logits"]
    found = lowered_logits(after, step_inputs(after, np.float32))
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < error * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_lowered_graph_computes_what_the_canonical_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoint = open_checkpoint(save_llama(tmp_path, llama_tensors()))
    options = BuildOptions(target="tensorrt", **FORMATS[name])
    assert_same_logits(checkpoint, monkeypatch, options, 0.05 if name == "bf16" else 0.01)


@pytest.mark.parametrize("bits", [8, "fp8"])
def test_x_is_rounded_by_the_scale_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
    bits: Any,  # noqa: ANN401
) -> None:
    scheme = float8(activation="static") if bits == "fp8" else integers(8, 0, activation="static")
    checkpoint = quantized_llama({"_proj": scheme})
    options = BuildOptions(target="tensorrt", dtype="float16")
    # Numbers of x that differ in their last bit may be rounded to neighbours, 0.05 apart.
    assert_same_logits(checkpoint, monkeypatch, options, 0.1)
    graph = compile_checkpoint(checkpoint, options).program.graph
    kind = "float8_e4m3fn" if bits == "fp8" else "int8"
    rounded = f"TensorRT {kind}, a scale a row, x rounded by a fixed scale"
    assert count_kernels(graph)[rounded] == 4 * LAYERS


def test_a_scale_of_x_is_computed_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of AWQ, which scales columns of x before int4 weights apply."""
    scheme = with_input(integers(4, 32), scale=3)
    options = BuildOptions(target="tensorrt", dtype="float16")
    assert_same_logits(quantized_llama({"_proj": scheme}), monkeypatch, options, 0.02)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({"bits": 4, "group": 64}, True),
        ({"bits": 4, "group": 48}, False),  # no block that was seen fused
        ({"bits": 4, "group": 256}, False),  # one block is the whole of K
        ({"bits": 4, "group": 64, "zero": "zero"}, False),
        ({"bits": 4, "group": 64, "zero": "offset"}, False),
        ({"bits": 8, "group": 256}, True),
        ({"bits": 8, "group": 64}, False),  # unpacked by a kernel of its own
        ({"bits": 8, "group": 256, "activation": "token"}, False),
        ({"bits": 8, "group": 256, "activation": "static"}, True),
        ({"kind": "float8_e4m3", "group": 256}, True),
        ({"kind": "float8_e4m3", "group": 128, "rows": 128}, False),
    ],
)
def test_only_what_a_fused_kernel_was_seen_for_is_held(changes: dict[str, Any], held: bool) -> None:
    assert holds(WeightFormat((512, 256), **{"kind": "int", **changes})) == held


def test_what_no_kernel_holds_becomes_dense(caplog: pytest.LogCaptureFixture) -> None:
    compiled = compile_checkpoint(
        quantized_llama({"_proj": integers(4, 32, zero="zero")}), BuildOptions(target="tensorrt")
    )
    assert count_kernels(compiled.program.graph) == {"TensorRT bfloat16": 4 * LAYERS + 1}
    assert "target tensorrt has no kernel for int4, groups of 32, zero points" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4_wo", "symmetric": False}, "without zero points"),
        ({"quantization": "int8_wo", "group_size": 32}, "a scale a row"),
        ({"dtype": "float32"}, "does not run on target tensorrt"),
        ({"kv_cache_dtype": "int8"}, "does not run on target tensorrt"),
        ({"ort_attention": "pages"}, "does not run on target tensorrt"),
        ({"tp_size": 2}, "tp_size 2 does not run on target tensorrt"),
    ],
)
def test_options_that_nothing_computes(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        planned(tmp_path, **options)


def test_four_bit_floats_are_refused() -> None:
    with pytest.raises(BuildError, match=r"reaches no kernel.*use --target cuda"):
        compile_checkpoint(quantized_llama({"_proj": float4}), BuildOptions(target="tensorrt"))


def test_operators_that_no_plan_computes_are_refused() -> None:
    routes = ir.node("Router", [], {"top_k": 2}, domain="slipstream", name="layers.0/mlp/Router")
    program = Program(ir.Model(ir.Graph([], [], nodes=[routes]), ir_version=11))
    with pytest.raises(BuildError, match=r"operator Router.*mixture of experts.*--target cuda"):
        check_runs(program)


def test_reports_count_products_and_leave_out_the_table_of_rows(tmp_path: Path) -> None:
    compiled = planned(tmp_path, quantization="int4_wo", group_size=32)
    graph = compiled.program.graph
    assert count_kernels(graph) == {
        "TensorRT int4, groups of 32": 4 * LAYERS, "TensorRT bfloat16": 1,
    }  # fmt: skip
    table = 2 * LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert step_weights(graph).common == compiled.weight_bytes - table


@pytest.mark.parametrize(("options", "oldest"), [({}, "sm_80"), ({"quantization": "fp8"}, "sm_89")])
def test_the_oldest_gpu(tmp_path: Path, options: dict[str, Any], oldest: str) -> None:
    assert planned(tmp_path, **options).capability == oldest


def test_operators_of_a_plan_are_counted_by_function(tmp_path: Path) -> None:
    layer = next(f for f in planned(tmp_path).program.model.functions.values() if f.name == "layer")
    assert Counter(node.op_type for node in layer) == {
        "Transpose": 4, "MatMul": 4, "Add": 2, "RMSNormalization": 2, "Split": 1, "Sigmoid": 1,
        "Mul": 2,
    }  # fmt: skip
    assert TARGET.page_size == 64
