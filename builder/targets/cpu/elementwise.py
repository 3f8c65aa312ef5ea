"""Norms and gates that no Linear absorbed, on ONNX Runtime's kernels."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program

_CONTRIB = "com.microsoft"


def lower_rms_norm(program: Program) -> int:
    """RMSNormalization becomes SimplifiedLayerNormalization, which every onnxruntime since 1.18
    has."""
    nodes = program.nodes("RMSNormalization")
    for node in nodes:
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1}
        norm = ir.node(
            "SimplifiedLayerNormalization", node.inputs, attributes, num_outputs=1, name=node.name
        )
        replace(program, [node], [norm], {node.outputs[0]: norm.outputs[0]})
    return len(nodes)


def lower_add_rms_norm(program: Program) -> int:
    """FusedAddRMSNorm becomes SkipSimplifiedLayerNormalization."""
    nodes = program.nodes("FusedAddRMSNorm")
    for node in nodes:
        attributes = {"epsilon": node.attributes["norm_eps"].as_float()}
        skip = ir.node(
            "SkipSimplifiedLayerNormalization",
            node.inputs,
            attributes,
            domain=_CONTRIB,
            num_outputs=4,
            name=node.name,
        )
        # Outputs 1 and 2 (mean and inverse deviation) are for training; unnamed outputs are not
        # computed.
        skip.outputs[1].name = skip.outputs[2].name = ""
        replace(
            program,
            [node],
            [skip],
            {node.outputs[0]: skip.outputs[0], node.outputs[1]: skip.outputs[3]},
        )
    return len(nodes)


def lower_gated_activation(program: Program) -> int:
    """silu(gate) * up as Split, QuickGelu with alpha 1 (which is SiLU) and Mul."""
    nodes = program.nodes("GatedActivation")
    for node in nodes:
        split = ir.node(
            "Split",
            [node.inputs[0]],
            {"axis": -1, "num_outputs": 2},
            num_outputs=2,
            name=f"{node.name}/split",
        )
        gate, up = split.outputs
        silu = ir.node(
            "QuickGelu",
            [gate],
            {"alpha": 1.0},
            domain=_CONTRIB,
            num_outputs=1,
            name=f"{node.name}/silu",
        )
        product = ir.node("Mul", [silu.outputs[0], up], num_outputs=1, name=f"{node.name}/mul")
        shape = node.outputs[0].shape
        for value, suffix in ((gate, "gate"), (up, "up"), (silu.outputs[0], "silu")):
            value.name, value.shape, value.type = (
                f"{node.name}/{suffix}",
                shape,
                ir.TensorType(ir.DataType.FLOAT),
            )
        replace(program, [node], [split, silu, product], {node.outputs[0]: product.outputs[0]})
    return len(nodes)
