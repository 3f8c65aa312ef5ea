"""The likeliest tokens beside logits: what most rows of a step are asked for."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.contract import LOGITS, TOP_LOGIT, TOP_TOKEN
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN


def add_top_tokens(program: Program) -> int:
    """Beside logits the graph gives the best token of each row and its logit, so that nobody need
    read the rest for it."""
    logits = next((value for value in program.graph.outputs if value.name == LOGITS), None)
    if logits is None:
        return 0
    node = ir.node("TopToken", [logits], domain=DOMAIN, num_outputs=2, name="TopToken")
    program.graph.append(node)
    assert logits.shape is not None
    kinds = ir.DataType.INT32, ir.DataType.FLOAT
    for value, name, kind in zip(node.outputs, (TOP_TOKEN, TOP_LOGIT), kinds, strict=True):
        value.type, value.shape = ir.TensorType(kind), ir.Shape(logits.shape[:1])
        program.give(value, name)
    return 1
