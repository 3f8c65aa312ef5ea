"""The cosines and sines of the rotary angles become one RotaryAngles.

positions ─ Cast ─ Unsqueeze ─ Mul(inv_freq) ─┬─ Cos ─ [Mul(factor)]      positions ─ RotaryAngles
                                              └─ Sin ─ [Mul(factor)]  ──▶
"""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN


def fuse_rotary(program: Program) -> int:
    """Fuse every pair of Cos and Sin that read the same angles."""
    return sum(_fuse(program, node) for node in program.nodes("Cos"))


def _fuse(program: Program, cos: ir.Node) -> bool:
    angles = cos.inputs[0]
    assert angles is not None
    sines = [use.node for use in angles.uses() if use.node.op_type == "Sin"]
    chain = _chain(angles)
    if len(sines) != 1 or chain is None:
        return False
    positions, inv_freq, producers = chain
    tails = [_scaled(wave) for wave in (cos, sines[0])]
    factor = tails[0][1]
    frequencies = program.constant("rotary_inv_freq", inv_freq.const_value.numpy().reshape(-1))  # type: ignore[union-attr]
    fused = ir.node(
        "RotaryAngles",
        [positions, frequencies],
        {"factor": factor},
        domain=DOMAIN,
        num_outputs=2,
        name=cos.name,
    )
    old = list(dict.fromkeys([*producers, cos, sines[0], *(node for node, _ in tails)]))
    old.sort(key=list(program.graph).index)
    outputs = {node.outputs[0]: fused.outputs[index] for index, (node, _) in enumerate(tails)}
    replace(program, old, [fused], outputs)
    return True


def _chain(angles: ir.Value) -> tuple[ir.Value, ir.Value, list[ir.Node]] | None:
    """Positions, frequencies and the nodes that multiply them."""
    nodes: list[ir.Node] = []
    value: ir.Value | None = angles
    for op_type in ("Mul", "Unsqueeze", "Cast"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op_type:
            return None
        nodes.append(node)
        value = node.inputs[0]
    inv_freq = nodes[0].inputs[1]
    if value is None or inv_freq is None or inv_freq.const_value is None:
        return None
    return value, inv_freq, nodes[::-1]


def _scaled(wave: ir.Node) -> tuple[ir.Node, float]:
    """The node that makes the final cosines or sines, and the constant factor in them."""
    consumer = sole_consumer(wave.outputs[0])
    if consumer is None or consumer.op_type != "Mul":
        return wave, 1.0
    constant = consumer.inputs[1]
    assert constant is not None and constant.const_value is not None
    return consumer, float(constant.const_value.numpy())
