"""Gates and types in standard operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
from tests.programs import apply, assert_close, feeds, outputs, parse, run_onnxruntime
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.build import plan
from slipstream.builder.options import BuildOptions
from slipstream.builder.targets.tensorrt.elementwise import cast_outputs, lower_gates
from slipstream.plugins.gated_mlp import GATES


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_what_it_was_in_onnx_s_own_operators(gate: str) -> None:
    program = parse(
        "g (float[T, 8] x) => (float[T, 4] y) "
        f"{{ y = slipstream.GatedActivation <gate: int = {GATES[gate]}> (x) }}"
    )
    before = outputs(program)
    assert apply(program, lower_gates) == [1]
    assert {node.domain for node in program.graph} == {""}
    assert_close(run_onnxruntime(program, feeds(program)), before)


def test_what_caps_logits_is_computed_in_float32() -> None:
    program = parse(
        "g (float[T, 8] x, float[8] w) => (float[T, 8] logits) { n = RMSNormalization <axis: int = "
        "-1, epsilon: float = 1e-6> (x, w) logits = slipstream.SoftCap <cap: float = 30.0> (n) }"
    )
    before = outputs(program)
    assert apply(program, cast_outputs) == [1]
    assert [node.op_type for node in program.graph] == ["RMSNormalization", "Cast", "SoftCap"]
    assert_close(outputs(program), before)


def test_vectors_are_float32_too(tmp_path: Path) -> None:
    source = save_llama(tmp_path, llama_tensors())
    model = plan(source, BuildOptions(target="tensorrt", task="embed")).program.model
    (states,) = model.graph.outputs
    assert (states.name, states.dtype) == ("states", ir.DataType.FLOAT)
    tail = next(f for f in model.functions.values() if f.name == "tail")
    assert Counter(node.op_type for node in tail) == {"RMSNormalization": 1, "Cast": 1}
