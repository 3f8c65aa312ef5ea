from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from tests.programs import listing

from slipstream.builder.contract import Source
from slipstream.builder.graph.ops import Ops
from slipstream.builder.graph.passes.fuse_rotary import fuse_rotary
from slipstream.builder.graph.program import Program, new_program
from slipstream.builder.graph.verifier import verify

FREQUENCIES = np.array([1.0, 0.1, 0.01], np.float32)


def program_with(factor: float) -> Program:
    program = new_program("g")
    ops = Ops(program)
    for value, name in zip(
        ops.rotary(ops.input(Source.POSITIONS), FREQUENCIES, factor), ("cos", "sin"), strict=True
    ):
        ops.output(value, name)
    return program


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_angles_become_one_node(factor: float) -> None:
    program = program_with(factor)
    assert fuse_rotary(program) == 1
    program.drop_unused_weights()
    verify(program, "fuse_rotary")
    assert listing(program) == [
        f"cos, sin = RotaryAngles(positions, rotary_inv_freq) factor={factor:.6g}"
    ]
    constant = program.graph.initializers["rotary_inv_freq"].const_value
    assert constant is not None
    np.testing.assert_array_equal(constant.numpy(), FREQUENCIES)
    assert [value.dtype for value in program.graph.outputs] == [ir.DataType.FLOAT] * 2


def test_a_cosine_without_its_sine_stays() -> None:
    program = program_with(1.0)
    (sine,) = program.nodes("Sin")
    program.graph.outputs.pop()
    program.graph.remove(sine, safe=True)
    before = listing(program)
    assert fuse_rotary(program) == 0
    assert listing(program) == before
