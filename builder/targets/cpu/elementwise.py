"""Norms and gates that no Linear absorbed, and soft caps, on ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program
from slipstream.plugins.gated_mlp import GATES

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


def lower_gated_activation(program: Program, portable: bool = False) -> int:
    """A gated activation as Split, what its gate is of ONNX Runtime's operators, and Mul;
    ``portable`` takes only those that its CUDA provider has for every type, too."""
    nodes = program.nodes("GatedActivation")
    for node in nodes:
        _lower_gate(program, node, portable)
    return len(nodes)


def lower_soft_cap(program: Program) -> int:
    """A soft cap as Div, Tanh and Mul."""
    nodes = program.nodes("SoftCap")
    for node in nodes:
        number = np.array(node.attributes["cap"].as_float(), np.float32)
        cap, y = program.constant("cap", number), node.outputs[0]
        ratio = ir.node("Div", [node.inputs[0], cap], num_outputs=1, name=f"{node.name}/0")
        bounded = ir.node("Tanh", ratio.outputs, num_outputs=1, name=f"{node.name}/1")
        product = ir.node("Mul", [bounded.outputs[0], cap], num_outputs=1, name=f"{node.name}/2")
        for made in (ratio, bounded, product):
            made.outputs[0].name, made.outputs[0].shape = f"{made.name}/0", y.shape
            made.outputs[0].type = y.type
        replace(program, [node], [ratio, bounded, product], {y: product.outputs[0]})
    return len(nodes)


def _lower_gate(program: Program, node: ir.Node, portable: bool) -> None:
    (gate_up,) = node.inputs
    made = [ir.node("Split", [gate_up], {"axis": -1, "num_outputs": 2}, num_outputs=2)]

    def make(op: str, *inputs: ir.Value, **attributes: float | str) -> ir.Value:
        domain = _CONTRIB if op in ("QuickGelu", "FastGelu") else ""
        made.append(ir.node(op, inputs, attributes, domain=domain, num_outputs=1))
        return made[-1].outputs[0]

    def number(value: float) -> ir.Value:
        return program.constant("number", np.array(value, np.float32))

    def swish(x: ir.Value, alpha: float) -> ir.Value:
        if not portable:
            return make("QuickGelu", x, alpha=alpha)
        return make("Mul", x, make("Sigmoid", x if alpha == 1 else make("Mul", x, number(alpha))))

    gate, up = made[0].outputs
    kind = node.attributes["gate"].as_int() if "gate" in node.attributes else GATES["silu"]
    if kind == GATES["silu"]:
        gate = swish(gate, 1.0)
    elif kind == GATES["gelu_tanh"]:
        gate = make("FastGelu", gate) if portable else make("Gelu", gate, approximate="tanh")
    else:
        gate = swish(make("Min", gate, number(7.0)), 1.702)
        up = make("Add", make("Clip", up, number(-7.0), number(7.0)), number(1.0))
    product = make("Mul", gate, up)
    for number_of, part in enumerate(made):
        part.name = f"{node.name}/{number_of}"
        for index, value in enumerate(part.outputs):
            value.name, value.shape = f"{part.name}/{index}", node.outputs[0].shape
            value.type = ir.TensorType(ir.DataType.FLOAT)
    replace(program, [node], made, {node.outputs[0]: product})
