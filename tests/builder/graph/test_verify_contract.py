"""What a graph does that its contract does not say is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from tests.programs import dense

from slipstream.builder.contract import (
    LOGITS,
    CacheArray,
    CacheSpec,
    GraphSpec,
    Source,
    attention_cache,
)
from slipstream.builder.graph.ops import FLOAT, Attributes, Ops
from slipstream.builder.graph.program import Program, new_program
from slipstream.builder.graph.verifier import VerificationError, verify

STATE = CacheSpec("ssm", "state", (0,), (CacheArray("ssm", "float32", (8,)),))
CACHES = (
    attention_cache("float32", [0], 16, 1, 8),
    attention_cache("float32", [1], 16, 1, 8, name="near", window=32),
    STATE,
)


def node(program: Program, op_type: str, *inputs: ir.Value) -> ir.Value:
    """A node that keeps the shape of what it reads."""
    output = ir.Value(name=f"new.{op_type}", shape=inputs[0].shape, type=ir.TensorType(FLOAT))
    program.graph.append(ir.node(op_type, inputs, outputs=[output], name=f"node.{op_type}"))
    return output


@pytest.fixture
def program() -> Program:
    ops = Ops(new_program("test"), CACHES)
    x = ops.embedding(ops.input(Source.TOKEN_IDS), dense("e", 320, 32))
    angles = ops.rotary(ops.input(Source.POSITIONS), np.ones(4, np.float32), 1.0)
    heads: Attributes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "scale": 0.5}
    for layer, window in enumerate((0, 32)):
        attributes: Attributes = {**heads, "layer": layer, "sliding_window": window}
        attended = ops.paged_attention(x, angles, [], attributes)
        x = ops.add(x, ops.linear(attended, dense(f"w{layer}", 32, 16)))
    (state,) = ops.arrays(STATE)
    ops.output(node(ops.program, "Neg", state), "ssm_after", updates=state)
    ops.output(ops.linear(ops.pick_rows(x), dense("head", 320, 32)), LOGITS)
    ops.program.contract, ops.program.caches = ops.contract("graph.onnx"), ops.caches
    return ops.program


def contract(program: Program) -> GraphSpec:
    assert program.contract is not None
    return program.contract


def attention(program: Program) -> ir.Node:
    return program.nodes("PagedAttention")[1]


def value(program: Program, name: str) -> ir.Value:
    return next(value for value in program.graph.inputs if value.name == name)


def input_too_many(program: Program) -> None:
    program.graph.inputs.append(ir.Value(name="new", shape=ir.Shape(["T"])))


def input_of_another_shape(program: Program) -> None:
    value(program, "positions").shape = ir.Shape(["S"])


def output_too_few(program: Program) -> None:
    program.graph.outputs.pop()


def output_of_another_dtype(program: Program) -> None:
    program.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def pages_of_two_caches(program: Program) -> None:
    attention(program).replace_input_with(6, value(program, "page_table"))


def pages_of_no_cache(program: Program) -> None:
    inputs = tuple(replace(port, cache=None) for port in contract(program).inputs)
    program.contract = replace(contract(program), inputs=inputs)


def layer_beyond(program: Program) -> None:
    attention(program).attributes["layer"] = ir.AttrInt64("layer", 1)


def further_than_is_kept(program: Program) -> None:
    attention(program).attributes["sliding_window"] = ir.AttrInt64("sliding_window", 33)


def all_keys_of_a_window(program: Program) -> None:
    del attention(program).attributes["sliding_window"]


def read_after_update(program: Program) -> None:
    node(program, "Abs", value(program, "ssm"))


def update_of_a_step(program: Program) -> None:
    first, *rest = contract(program).outputs
    outputs = (replace(first, updates="positions"), *rest)
    program.contract = replace(contract(program), outputs=outputs)


def lost_seam(program: Program) -> None:
    program.contract = replace(contract(program), seam=("Add_1", "gone"))


def another_seam(program: Program) -> None:
    program.contract = replace(contract(program), seam=("Add", "Gather"))


def reading_across_the_seam(program: Program) -> None:
    node(program, "Abs", program.nodes("Add")[1].outputs[0])


DEFECTS: dict[Callable[[Program], None], str] = {
    input_too_many: r"the inputs are not the contract's: .*'new'",
    input_of_another_shape: "the inputs are not the contract's: .*'positions'",
    output_too_few: "the outputs are not the contract's: .*'logits'",
    output_of_another_dtype: "the outputs are not the contract's: .*'float16'",
    pages_of_two_caches: r"PagedAttention_1 reads pages of \['kv', 'near'\], not of one cache",
    pages_of_no_cache: r"PagedAttention reads pages of \[None\], not of one cache",
    layer_beyond: "PagedAttention_1 is layer 1 of 1 in cache near",
    further_than_is_kept: "PagedAttention_1 sees 33 keys, of which 32 are kept",
    all_keys_of_a_window: "PagedAttention_1 sees all keys, of which 32 are kept",
    read_after_update: "node.Abs may read ssm after ssm_after took its place",
    update_of_a_step: "output ssm_after updates positions, which is no array of a cache",
    lost_seam: "gone is not made of Add_1, where the contract has a seam",
    another_seam: "Gather is not made of Add, where the contract has a seam",
    reading_across_the_seam: "node.Abs reads Add_1 across the seam",
}


def test_a_program_that_keeps_its_contract_passes(program: Program) -> None:
    verify(program, "the test")


@pytest.mark.parametrize("damage", DEFECTS, ids=lambda damage: damage.__name__)
def test_every_defect_is_named(program: Program, damage: Callable[[Program], None]) -> None:
    damage(program)
    with pytest.raises(VerificationError, match=f"^after the test: .*{DEFECTS[damage]}"):
        verify(program, "the test")
