"""Add(residual, Linear(x)) becomes a Linear with a residual input; an ExpertLinear likewise."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import Holds, replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.plugins.operators import DOMAIN, OPERATORS


def fuse_residual(program: Program, holds: Holds = can_pack) -> int:
    """Fuse every Add of the only use of a Linear whose weight a kernel ``holds``, or of what an
    ExpertLinear adds up."""
    return sum(_fuse(program, node, holds) for node in program.nodes("Add"))


def _fuse(program: Program, add: ir.Node, holds: Holds) -> bool:
    for product, residual in (add.inputs, add.inputs[::-1]):
        linear = product.producer() if product is not None else None
        if product is None or linear is None or sole_consumer(product) is not add:
            continue
        if not _takes_any(program, linear, holds):
            continue
        names = [tensor.name for tensor in OPERATORS[linear.op_type].inputs]
        place = names.index("residual")
        if len(linear.inputs) > place:
            continue
        inputs = [*linear.inputs, *[None] * (place - len(linear.inputs)), residual]
        kind, name = linear.op_type, linear.name
        fused = ir.node(kind, inputs, linear.attributes, domain=DOMAIN, num_outputs=1, name=name)
        replace(program, [linear, add], [fused], {add.outputs[0]: fused.outputs[0]})
        return True
    return False


def _takes_any(program: Program, node: ir.Node, holds: Holds) -> bool:
    """Whether the kernel of a product adds a residual."""
    if node.op_type == "ExpertLinear":
        return "reduce" in node.attributes and bool(node.attributes["reduce"].as_int())
    return node.op_type == "Linear" and holds(program.weight_of(node).format)
