"""Add(residual, Linear(x)) becomes a Linear with a residual input."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import Holds, linear_only_for, replace
from slipstream.builder.graph.program import Program
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.plugins.operators import DOMAIN


def fuse_residual(program: Program, holds: Holds = can_pack) -> int:
    """Fuse every Add of the only use of a Linear whose weight a kernel ``holds``."""
    return sum(_fuse(program, node, holds) for node in program.nodes("Add"))


def _fuse(program: Program, add: ir.Node, holds: Holds) -> bool:
    for product, residual in (add.inputs, add.inputs[::-1]):
        linear = linear_only_for(add, product)
        if linear is None or len(linear.inputs) > 3 or not holds(program.weight_of(linear).format):
            continue
        bias = linear.inputs[2] if len(linear.inputs) > 2 else None
        inputs = [linear.inputs[0], linear.inputs[1], bias, residual]
        fused = ir.node(
            "Linear", inputs, linear.attributes, domain=DOMAIN, num_outputs=1, name=linear.name
        )
        replace(program, [linear, add], [fused], {add.outputs[0]: fused.outputs[0]})
        return True
    return False
