"""PagedAttention nodes as calls."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from torch import Tensor

from slipstream.plugins.cuda.binding import (
    SETTLED,
    Context,
    Kernel,
    Run,
    attributes_of,
    input_names,
    name_of,
)
from slipstream.plugins.paged_attention.cuda import attention
from slipstream.plugins.paged_attention.reference import Attributes


def attention_attributes(node: ir.Node) -> Attributes:
    """The attributes of a PagedAttention, with their defaults."""
    return Attributes(**attributes_of(node))


def paged_attention(node: ir.Node, context: Context) -> Kernel:
    """The pages, and what the step says of them, come with the step."""
    qkv, cos, sin, pages = (name_of(value) for value in node.inputs[:4])
    page_table = name_of(node.inputs[6])
    q_norm, k_norm, sinks = input_names(node, 12)[9:]
    attributes = attention_attributes(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        step, memory = run.kv()
        attended = attention.paged_attention(
            run.values[qkv],
            run.values[cos],
            run.values[sin],
            memory.pages[pages],
            step.attention[page_table],
            attributes,
            q_norm=run.get(q_norm),
            k_norm=run.get(k_norm),
            sinks=run.get(sinks),
            workspace=memory.workspace,
            pdl=run.pdl,
            early=SETTLED in run.shared,
            deterministic=context.tactics.deterministic,
            plans=run.shared.setdefault("plans of decodes", {}),
        )
        return (attended,)

    return kernel
