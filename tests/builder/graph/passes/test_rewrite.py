from __future__ import annotations

import onnx_ir as ir
import pytest
from tests.programs import listing, parse

from slipstream.builder.graph.passes.rewrite import replace, sole_consumer
from slipstream.builder.graph.program import Program

TEXT = """g (float[T, 8] x) => (float[T, 8] y, float[T, 8] z) {
  a = Mul (x, x)
  y = Add (a, x)
  b = Mul (y, x)
  z = Add (b, b)
}"""


@pytest.fixture
def program() -> Program:
    return parse(TEXT)


def test_the_new_node_takes_place_name_shape_and_every_use(program: Program) -> None:
    mul, add = program.nodes("Mul")[0], program.nodes("Add")[0]
    new = ir.node("Sub", [mul.inputs[0], mul.inputs[1]], num_outputs=1, name="sub")
    replace(program, [mul, add], [new], {add.outputs[0]: new.outputs[0]})
    assert listing(program) == ["y = Sub(x, x)", "b = Mul(y, x)", "z = Add(b, b)"]
    output = program.graph.outputs[0]
    assert output is new.outputs[0]
    assert output.shape == ["T", 8] and output.dtype == ir.DataType.FLOAT


def test_several_new_nodes_keep_their_order(program: Program) -> None:
    mul = program.nodes("Mul")[1]
    first = ir.node("Sub", [mul.inputs[0], mul.inputs[1]], num_outputs=1, name="first")
    second = ir.node("Neg", [first.outputs[0]], num_outputs=1, name="second")
    first.outputs[0].name = "s"
    replace(program, [mul], [first, second], {mul.outputs[0]: second.outputs[0]})
    assert listing(program)[2:] == ["s = Sub(y, x)", "b = Neg(s)", "z = Add(b, b)"]


def test_a_node_that_is_still_read_cannot_go(program: Program) -> None:
    mul = program.nodes("Mul")[0]
    new = ir.node("Neg", [mul.inputs[0]], num_outputs=1)
    with pytest.raises(ValueError, match="still being used"):
        replace(program, [mul], [new], {})


def test_sole_consumer(program: Program) -> None:
    a, y, b, z = (node.outputs[0] for node in program.graph)
    assert sole_consumer(a) is y.producer()
    assert sole_consumer(y) is None  # read once, and an output
    assert sole_consumer(b) is None  # read twice by one node
    assert sole_consumer(z) is None  # read by nobody
