"""GatedActivation(Linear(x)) becomes one gated Linear, which never writes gate and up to memory."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import Holds, linear_only_for, replace
from slipstream.builder.graph.program import Program
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.plugins.operators import DOMAIN


def fuse_gate(program: Program, holds: Holds = can_pack) -> int:
    """Fuse every GatedActivation into the Linear before it, if a kernel ``holds`` its weight."""
    return sum(_fuse(program, node, holds) for node in program.nodes("GatedActivation"))


def _fuse(program: Program, gate: ir.Node, holds: Holds) -> bool:
    linear = linear_only_for(gate, gate.inputs[0])
    if linear is None:
        return False
    # A residual would be added before the gate here and is added after it by a gated Linear.
    plain = len(linear.inputs) <= 3 and "gated" not in linear.attributes
    if not plain or not holds(program.weight_of(linear).format):
        return False
    fused = ir.node(
        "Linear",
        linear.inputs,
        {**linear.attributes, "gated": 1, **gate.attributes},
        domain=DOMAIN,
        num_outputs=1,
        name=linear.name,
    )
    replace(program, [linear, gate], [fused], {gate.outputs[0]: fused.outputs[0]})
    return True
