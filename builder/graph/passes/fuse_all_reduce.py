"""AllReduce, the Add of the residual stream and the RMSNormalization of the sum become one node, so
that ranks meet, add and normalize in one kernel.

    product ─ AllReduce ─ Add ─┬─ RMSNormalization ─▶    product ─ AllReduceAddRMSNorm ─▶ y
    residual ──────────────────┘└─▶ sum                  residual ─┘                 └─▶ sum
"""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN


def fuse_all_reduce(program: Program) -> int:
    """Fuse every Add of a sum over ranks that one RMSNormalization reads; other readers take the
    sum output."""
    return sum(_fuse(program, node) for node in program.nodes("Add"))


def _fuse(program: Program, add: ir.Node) -> bool:
    total = add.outputs[0]
    norms = [use.node for use in total.uses() if use.node.op_type == "RMSNormalization"]
    if len(norms) != 1 or norms[0].inputs[0] is not total:
        return False
    for reduced, residual in (add.inputs, add.inputs[::-1]):
        maker = None if reduced is None else reduced.producer()
        if reduced is None or maker is None or maker.op_type != "AllReduce":
            continue
        if sole_consumer(reduced) is not add:
            continue
        norm = norms[0]
        attributes = {
            "ranks": maker.attributes["ranks"].as_int(),
            "norm_eps": norm.attributes["epsilon"].as_float(),
        }
        inputs = [maker.inputs[0], residual, norm.inputs[1]]
        fused = ir.node(
            "AllReduceAddRMSNorm", inputs, attributes, domain=DOMAIN, num_outputs=2, name=norm.name
        )
        # The fused node stands where the Add stood, before every other reader of the sum.
        values = {norm.outputs[0]: fused.outputs[0], total: fused.outputs[1]}
        replace(program, [maker, norm, add], [fused], values)
        return True
    return False
