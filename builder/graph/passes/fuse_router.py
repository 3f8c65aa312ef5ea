"""Router(Linear(RMSNormalization(x))) becomes a NormedRouter, whose first output is the norm."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import linear_only_for, replace
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN


def fuse_router(program: Program) -> int:
    """Fuse every Router of the dense product of a norm; other readers of the norm keep it."""
    return sum(_fuse(program, node) for node in program.nodes("Router"))


def _fuse(program: Program, router: ir.Node) -> bool:
    linear = linear_only_for(router, router.inputs[0])
    norm = None if linear is None or linear.inputs[0] is None else linear.inputs[0].producer()
    if linear is None or norm is None or norm.op_type != "RMSNormalization":
        return False
    plain = len(linear.inputs) <= 3 and "gated" not in linear.attributes
    if not plain or program.weight_of(linear).format.kind != "dense":
        return False
    (x, gain), bias = norm.inputs, linear.inputs[2] if len(linear.inputs) > 2 else None
    correction = router.inputs[1] if len(router.inputs) > 1 else None
    epsilon = norm.attributes["epsilon"].as_float()
    attributes = {
        **{name: linear.attributes[name] for name in ("in_features", "out_features")},
        **router.attributes,
        "norm_eps": ir.AttrFloat32("norm_eps", epsilon),
    }
    fused = ir.node(
        "NormedRouter",
        [x, linear.inputs[1], gain, bias, correction],
        attributes,
        domain=DOMAIN,
        num_outputs=3,
        name=router.name,
    )
    # What else reads the norm comes after all three.
    program.graph.insert_after(norm, [linear, router])
    values = dict(zip([norm.outputs[0], *router.outputs], fused.outputs, strict=True))
    replace(program, [norm, linear, router], [fused], values)
    return True
