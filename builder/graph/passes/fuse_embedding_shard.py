"""The lookup in a rank's part of the embedding becomes one node, which knows the tokens that only
the device knows.

    token_ids ─ Sub(first) ─┬─ Clip ─┬─ Embedding ─ Mul ─▶    token_ids ─ EmbeddingShard(first) ─▶
                            └─ Equal ┴─ Cast ─ Unsqueeze ┘
"""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN


def fuse_embedding_shard(program: Program) -> int:
    """Fuse every Embedding of clipped ids whose rows are multiplied by whether they are its own."""
    return sum(_fuse(program, node) for node in program.nodes("Embedding"))


def _fuse(program: Program, embedding: ir.Node) -> bool:
    clip = _made_by(embedding.inputs[0], "Clip")
    scaled = sole_consumer(embedding.outputs[0])
    if clip is None or scaled is None or scaled.op_type != "Mul":
        return False
    subtract = _made_by(clip.inputs[0], "Sub")
    column = _made_by(scaled.inputs[1], "Unsqueeze")
    cast = None if column is None else _made_by(column.inputs[0], "Cast")
    equal = None if cast is None else _made_by(cast.inputs[0], "Equal")
    if subtract is None or column is None or cast is None or equal is None:
        return False
    token_ids, first = subtract.inputs
    fused = ir.node(
        "EmbeddingShard",
        [token_ids, embedding.inputs[1], first],
        embedding.attributes,
        domain=DOMAIN,
        num_outputs=1,
        name=embedding.name,
    )
    old = [subtract, clip, equal, cast, column, embedding, scaled]
    replace(program, old, [fused], {scaled.outputs[0]: fused.outputs[0]})
    return True


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """What makes a value, if it is of this kind."""
    maker = None if value is None else value.producer()
    return maker if maker is not None and maker.op_type == op_type else None
