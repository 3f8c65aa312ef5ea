"""Add followed by RMSNormalization becomes FusedAddRMSNorm, which reads and writes the stream
once."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN


def fuse_add_rms_norm(program: Program) -> int:
    """Fuse every Add whose sum one RMSNormalization reads; other readers take the sum output."""
    return sum(_fuse(program, node) for node in program.nodes("Add"))


def _fuse(program: Program, add: ir.Node) -> bool:
    total = add.outputs[0]
    norms = [use.node for use in total.uses() if use.node.op_type == "RMSNormalization"]
    if len(norms) != 1:
        return False
    norm = norms[0]
    attributes = {"norm_eps": norm.attributes["epsilon"].as_float()}
    inputs = [add.inputs[1], add.inputs[0], norm.inputs[1]]
    fused = ir.node(
        "FusedAddRMSNorm", inputs, attributes, domain=DOMAIN, num_outputs=2, name=norm.name
    )
    # The fused node stands where the Add stood, before every other reader of the sum.
    replace(
        program, [norm, add], [fused], {norm.outputs[0]: fused.outputs[0], total: fused.outputs[1]}
    )
    return True
