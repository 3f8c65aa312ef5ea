"""Linear(RMSNormalization(x)) becomes a Linear that normalizes x while it quantizes it.

The norm goes when every one of its consumers is a packable Linear; each consumer then repeats the
cheap norm.
"""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import Holds, replace
from slipstream.builder.graph.program import Program
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.plugins.operators import DOMAIN


def fuse_norm(program: Program, holds: Holds = can_pack) -> int:
    """Fuse every RMSNormalization that only feeds Linears whose weights a kernel ``holds``."""
    return sum(_fuse(program, node, holds) for node in program.nodes("RMSNormalization"))


def _fuse(program: Program, norm: ir.Node, holds: Holds) -> bool:
    uses = norm.outputs[0].uses()
    consumers = [use.node for use in uses]
    as_x = all(use.idx == 0 for use in uses)  # the norm of a residual is no business of a Linear
    absorbed = as_x and all(_absorbs(program, node, holds) for node in consumers)
    if norm.outputs[0].is_graph_output() or not absorbed:
        return False
    for linear in consumers:
        inputs: list[ir.Value | None] = [norm.inputs[0], *linear.inputs[1:]]
        inputs += [None] * (4 - len(inputs)) + [norm.inputs[1]]
        fused = ir.node(
            "Linear", inputs, linear.attributes, domain=DOMAIN, num_outputs=1, name=linear.name
        )
        epsilon = norm.attributes["epsilon"].as_float()
        fused.attributes["norm_eps"] = ir.AttrFloat32("norm_eps", epsilon)
        replace(program, [linear], [fused], {linear.outputs[0]: fused.outputs[0]})
    program.graph.remove(norm, safe=True)
    return True


def _absorbs(program: Program, node: ir.Node, holds: Holds) -> bool:
    return (
        node.op_type == "Linear" and len(node.inputs) < 5 and holds(program.weight_of(node).format)
    )
