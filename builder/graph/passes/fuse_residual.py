"""Add(residual, Linear(x)) becomes a Linear with a residual input; so does the Add of a sum over
experts."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import Holds, replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.plugins.operators import DOMAIN

# Which input a residual is.
_RESIDUAL = {"Linear": 3, "ExpertLinear": 5}


def fuse_residual(program: Program, holds: Holds = can_pack) -> int:
    """Fuse every Add of the only use of a product that takes a residual: of a Linear whose weight
    a kernel ``holds``, or of an ExpertLinear that adds up the experts of a token."""
    return sum(_fuse(program, node, holds) for node in program.nodes("Add"))


def _fuse(program: Program, add: ir.Node, holds: Holds) -> bool:
    for value, residual in (add.inputs, add.inputs[::-1]):
        product = value.producer() if value is not None else None
        if value is None or product is None or sole_consumer(value) is not add:
            continue
        if not _takes_residual(program, product, holds):
            continue
        place = _RESIDUAL[product.op_type]
        inputs = [*product.inputs, *[None] * (place - len(product.inputs)), residual]
        fused = ir.node(
            product.op_type,
            inputs,
            product.attributes,
            domain=DOMAIN,
            num_outputs=1,
            name=product.name,
        )
        replace(program, [product, add], [fused], {add.outputs[0]: fused.outputs[0]})
        return True
    return False


def _takes_residual(program: Program, node: ir.Node, holds: Holds) -> bool:
    """Whether a node is a product without one."""
    place = _RESIDUAL.get(node.op_type)
    if place is None or len(node.inputs) > place:
        return False
    if node.op_type == "ExpertLinear":  # every target has a kernel for whatever its weight is
        return bool(node.attributes.get_int("reduce", 0))
    return holds(program.weight_of(node).format)
