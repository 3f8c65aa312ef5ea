from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from tests.programs import dense, grouped, parse

from slipstream.builder.graph.passes import run_passes
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.builder.graph.verifier import VerificationError, verify
from slipstream.plugins.operators import DOMAIN
from slipstream.weights.safetensors import ArraySpec

TEXT = """g (float[T, 64] x, float[T, 48] r, float[48, 64] w, float[48] b) => (float[T, 48] y) {
  [first] h = slipstream.Linear <in_features = 64, out_features = 48> (x, w, b)
  [second] i = slipstream.Linear <in_features = 64, out_features = 48> (x, w, b, r)
  [third] y = Add (h, i)
}"""


@pytest.fixture
def program() -> Program:
    return parse(TEXT, grouped("w", 48, 64), dense("b", 48))


def linear(program: Program) -> ir.Node:
    return program.nodes("Linear")[1]


def value(shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """A new graph input."""
    return ir.Value(name="new", shape=ir.Shape(shape), type=ir.TensorType(dtype))


def feed(program: Program, index: int, new: ir.Value) -> None:
    program.graph.inputs.append(new)
    linear(program).replace_input_with(index, new)


def swap(program: Program) -> None:
    program.graph.insert_before(program.nodes("Linear")[0], program.nodes("Add")[0])


def unknown_operator(program: Program) -> None:
    linear(program).op_type = "Lineal"


def unknown_attribute(program: Program) -> None:
    linear(program).attributes["colour"] = ir.AttrInt64("colour", 1)


def int_for_a_float(program: Program) -> None:
    linear(program).attributes["norm_eps"] = ir.AttrInt64("norm_eps", 1)


def float_for_an_int(program: Program) -> None:
    linear(program).attributes["gated"] = ir.AttrFloat32("gated", 1.0)


def another_domain(program: Program) -> None:
    linear(program).domain = "elsewhere"


def missing_attribute(program: Program) -> None:
    del linear(program).attributes["in_features"]


def missing_input(program: Program) -> None:
    linear(program).replace_input_with(0, None)


def too_many_inputs(program: Program) -> None:
    node = linear(program)
    inputs = [*node.inputs, *node.inputs]
    new = ir.node("Linear", inputs, node.attributes, domain=DOMAIN, num_outputs=1, name="second")
    program.graph.insert_after(node, new)


def wrong_dtype(program: Program) -> None:
    feed(program, 3, value(["T", 48], ir.DataType.INT32))


def no_dtype(program: Program) -> None:
    linear(program).outputs[0].type = None


def wrong_rank(program: Program) -> None:
    feed(program, 3, value(["T", 48, 1]))


def no_shape(program: Program) -> None:
    linear(program).outputs[0].shape = None


def shape_against_attribute(program: Program) -> None:
    feed(program, 0, value(["T", 32]))


def shapes_against_each_other(program: Program) -> None:
    feed(program, 3, value(["L", 48]))


def wrong_output_shape(program: Program) -> None:
    linear(program).outputs[0].shape = ir.Shape(["T", 24])


def output_of_nothing(program: Program) -> None:
    program.graph.outputs.append(value(["T", 48]))


def lost_weight(program: Program) -> None:
    program.weights["ghost"] = dense("ghost", 48)


def lost_stored_weight(program: Program) -> None:
    part = ArraySpec("ghost", np.dtype(np.float32), (1,))
    program.stored["ghost"] = StoredWeight((part,), lambda: (np.zeros(1, np.float32),))


DEFECTS: dict[Callable[[Program], None], str] = {
    swap: "third reads h before anything makes it",
    unknown_operator: "second is of unknown operator slipstream.Lineal",
    unknown_attribute: r"second \(Linear\) has unknown attributes \['colour'\]",
    int_for_a_float: r"has attribute norm_eps of type int, expected float",
    float_for_an_int: r"has attribute gated of type float, expected int",
    another_domain: "second is of unknown operator elsewhere.Linear",
    missing_attribute: r"second \(Linear\) lacks attributes \['in_features'\]",
    missing_input: r"second \(Linear\) lacks input x",
    too_many_inputs: r"second \(Linear\) has 8 inputs and 1 outputs",
    wrong_dtype: r"second \(Linear\) has residual of dtype int32, expected float32",
    no_dtype: r"second \(Linear\) has y of dtype none, expected float32",
    wrong_rank: r"second \(Linear\) has residual of shape \[T,48,1\]",
    no_shape: r"second \(Linear\) has y of shape None",
    shape_against_attribute: r"has x of shape \[T,32\], .* with in_features = 64",
    shapes_against_each_other: r"has residual of shape \[L,48\], .* with tokens = T",
    wrong_output_shape: r"has y of shape \[T,24\], .* with out_features//\(1\+gated\) = 48",
    output_of_nothing: "output new is made by no node",
    lost_weight: "weight ghost belongs to no value of the graph",
    lost_stored_weight: "weight ghost belongs to no value of the graph",
}


def test_a_good_program_passes(program: Program) -> None:
    verify(program, "the test")


@pytest.mark.parametrize("damage", DEFECTS, ids=lambda damage: damage.__name__)
def test_every_defect_is_named(program: Program, damage: Callable[[Program], None]) -> None:
    damage(program)
    with pytest.raises(VerificationError, match=f"^after the test: .*{DEFECTS[damage]}"):
        verify(program, "the test")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_weight_keeps_the_type_it_has_in_the_checkpoint(dtype: str) -> None:
    verify(parse(TEXT, grouped("w", 48, 64), dense("b", 48, dtype=dtype)), "the test")


def test_passes_are_logged_and_the_one_that_breaks_the_program_is_named(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    def keep(program: Program) -> int:
        return 3

    def break_it(program: Program) -> int:
        missing_attribute(program)
        return 1

    with (
        caplog.at_level(logging.INFO),
        pytest.raises(VerificationError, match="after break_it: second"),
    ):
        run_passes(program, [keep, break_it, keep])
    assert caplog.messages == ["pass keep: 3 matches"]


def test_a_broken_model_is_found_before_the_first_pass(program: Program) -> None:
    missing_attribute(program)
    with pytest.raises(VerificationError, match="after the model: second"):
        run_passes(program, [])


def test_weights_that_a_pass_leaves_unread_are_dropped(program: Program) -> None:
    def unbias(program: Program) -> int:
        for node in program.nodes("Linear"):
            node.replace_input_with(2, None)
        return 2

    run_passes(program, [unbias])
    assert list(program.weights) == ["w"]
